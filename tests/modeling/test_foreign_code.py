"""A folder with code of its own: nobody is asked whether to run it, it is not run, and an error says so (D11)."""

from __future__ import annotations

import ast
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import LlavaConfig, LlavaForConditionalGeneration

import sparsight
from small_runs import recipe_values, save_encoder
from sparsight import cli
from tiny import clip_config, make_language, make_vlm

AUTOS = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoTokenizer")
AUTOS += ("AutoProcessor", "AutoImageProcessor", "SparsightProcessor")

Command = Callable[..., str]


@pytest.fixture
def said_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command that must fail prints, when "y" is what the user would answer."""

    def call(*arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["sparsight", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = "".join(capsys.readouterr())
        assert "[y/N]" not in said and stopped.value.code == 2, said
        assert not (tmp_path / "was-run").exists()
        return " ".join(said.split())

    return call


def own_code(folder: Path, file: str, name: str, **values: object) -> Path:
    """Make a part of a folder one that comes with code; the code leaves a file behind when it runs."""
    path = folder / file
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(found | values | {"auto_map": {name: "own.Own"}}))
    (folder / "own.py").write_text(f"open({str(folder.parent / 'was-run')!r}, 'w').close()\nclass Own: ...\n")
    return folder


def recipe(folder: Path, **changes: object) -> Path:
    values = recipe_values(folder / "encoder", **changes) | {"evaluation": {"kind": "none"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


REFUSED = "contains custom code"
ADVICE = "Sparsight runs no code that comes with a model"


@pytest.mark.parametrize("verb", [("train",), ("data", "check", "--workers", 0)])
@pytest.mark.parametrize(
    "file, name, values",
    [
        ("config.json", "AutoConfig", {"model_type": "own"}),
        ("preprocessor_config.json", "AutoImageProcessor", {"image_processor_type": "Own"}),
    ],
)
def test_D11_an_encoder_with_code(
    tmp_path: Path, said_by: Command, verb: tuple, file: str, name: str, values: dict
) -> None:
    own_code(save_encoder(tmp_path / "encoder"), file, name, **values)
    said = said_by(*verb, recipe(tmp_path), "--out", "out")
    assert f"{tmp_path / 'encoder'} {REFUSED}" in said and ADVICE in said


@pytest.mark.parametrize("verb", [("train",), ("data", "check", "--workers", 0)])
def test_D11_a_language_model_with_code(tmp_path: Path, said_by: Command, verb: tuple) -> None:
    save_encoder(tmp_path / "encoder")
    for part in make_language():
        part.save_pretrained(tmp_path / "language")
    own_code(tmp_path / "language", "config.json", "AutoConfig", model_type="own")
    said = said_by(*verb, recipe(tmp_path, language=str(tmp_path / "language")), "--out", "out")
    assert f"{tmp_path / 'language'} {REFUSED}" in said and ADVICE in said


@pytest.mark.parametrize("verb", ["inspect", "analyze", "scale"])
def test_D11_a_saved_model_whose_image_processor_has_code(tmp_path: Path, said_by: Command, verb: str) -> None:
    for part in make_vlm():
        part.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "processor_config.json"
    values = json.loads(file.read_text())
    values["image_processor"] |= {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    file.write_text(json.dumps(values))
    options = ("--layout", "1:4,2:1") if verb == "scale" else ()
    said = said_by(verb, "model", "--out", "out", *options)
    assert REFUSED in said and ADVICE in said


def test_D11_a_part_of_a_model_of_transformers_with_code(tmp_path: Path, said_by: Command) -> None:
    """transformers builds the parts itself, and would ask: a part whose kind has no model in it."""
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    LlavaForConditionalGeneration(LlavaConfig(vision_config=clip_config(), text_config=text)).save_pretrained(
        tmp_path / "model"
    )
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    values["text_config"] = {"model_type": "pop2piano", "auto_map": {"AutoModel": "own.Own"}}
    file.write_text(json.dumps(values))
    said = said_by("analyze", "model", "--out", "out")
    assert "custom code" in said and ADVICE in said


def test_D11_every_call_says_that_no_code_is_run() -> None:
    calls = []
    for file in Path(sparsight.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if call.func.attr in ("from_pretrained", "from_config") and ast.unparse(call.func.value) in AUTOS:
                says = "trust_remote_code=False" in [ast.unparse(keyword) for keyword in call.keywords]
                calls.append((file.name, call.lineno, says))
    assert len(calls) > 10 and all(says for _, _, says in calls), calls
