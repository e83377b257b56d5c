"""`sparsight export`: a model in forms that other programs take."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsight.errors import UserError
from sparsight.modeling.configuration import MODULE
from sparsight.modeling.folders import read_json
from sparsight.modeling.llamacpp import write_gguf
from sparsight.modeling.native import to_native
from sparsight.modeling.quantised import check_installed, save_model, without_adapters
from sparsight.modeling.standalone import standalone_source
from sparsight.pipeline.files import load
from sparsight.safety import whole_folder

_LOADS = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "."  # this folder, or its id on a hub
model = AutoModelForImageTextToText.from_pretrained(name{trust})
processor = AutoProcessor.from_pretrained(name{trust})
```"""
_TRUST = ", trust_remote_code=True"


def export_model(folder: str | Path, out: str | Path, form: str, console: Console) -> Path:
    """Write a saved model in another form, with a model card.

    Args:
        out: the new folder; written whole or not at all.
        form: ``transformers``, ``remote-code``, ``gguf``, ``lora`` or ``merged``.

    Raises:
        UserError: there is no such form, it cannot express this model, or ``folder`` holds none of ours.
        FileExistsError: ``out`` exists.
    """
    if form not in FORMS:
        raise UserError(f"--to {form}: expected one of {', '.join(FORMS)}")
    with whole_folder(Path(out)) as partial:
        model, processor = load(folder)
        adapted = getattr(model, "_hf_peft_config_loaded", False)
        if adapted != (form in ("lora", "merged")) and form != "remote-code":
            found = "adapters beside its weights" if adapted else "no adapters"
            todo = "merge them first, by --to merged" if adapted else "give a model that was trained with lora.keep"
            raise UserError(f"--to {form}: {folder} has {found}; {todo}")
        if getattr(model, "is_quantized", False) and form not in ("remote-code", "lora"):
            raise UserError(
                f"--to {form}: {folder} has packed weights, and this form is for full precision (adapters merged into "
                "them would be rounded away in part). --to remote-code takes them as they are, --to lora adapters alone"
            )
        used = FORMS[form](model.eval(), processor, partial, str(folder))
        _write_card(Path(folder), partial, used)
    console.print(f"wrote [bold]{out}[/]")
    return Path(out)


def _native(model: Any, processor: Any, out: Path, _: str) -> str:
    for part in to_native(model, processor):
        part.save_pretrained(out)
    file = out / "config.json"
    values = read_json(file)
    if values["model_type"] == "vipllava":  # so was it called before
        values["vision_feature_layers"] = values["vision_feature_layer"]
        file.write_text(json.dumps(values, indent=2), encoding="utf-8")
    # Before, transformers loads other weights in place of CLIP's, with a warning alone.
    return "a model of `transformers`' own class: it needs transformers>=5.9 and no other code.\n\n" + _LOADS.format(
        trust=""
    )


def _remote_code(model: Any, processor: Any, out: Path, _: str) -> str:
    save_model(model, out)
    processor.save_pretrained(out)
    (out / f"{MODULE}.py").write_text(source := standalone_source(model.config), encoding="utf-8")
    needs = re.search(r"it needs (.*?), and no Sparsight", source.replace("\n", " "))
    assert needs
    return f"with its code in `{MODULE}.py`, which needs {needs[1]}.\n\n" + _LOADS.format(trust=_TRUST)


def _gguf(model: Any, processor: Any, out: Path, folder: str) -> str:
    check_installed("gguf", "gguf", f"--to gguf: {folder}")
    write_gguf(model, processor, out)
    return (
        "for llama.cpp: `llama-mtmd-cli -m language.gguf --mmproj mmproj.gguf --image IMAGE -p QUESTION`. Give it "
        f"images of {model.config.image_size} x {model.config.image_size} pixels: it resizes others in its own way."
    )


def _lora(model: Any, _: Any, out: Path, base: str) -> str:
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    model.save_pretrained(out)
    return f"adapters alone, for peft: `PeftModel.from_pretrained(model, folder)`, where `model` is that of `{base}`."


def _merged(model: Any, processor: Any, out: Path, _: str) -> str:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
    vars(model).pop("_weight_conversions", None)  # as in `save_model`: names would be those below adapters
    with without_adapters(model):
        model.save_pretrained(out)
    processor.save_pretrained(out)
    return "with its adapters merged, for Sparsight: `pip install sparsight`.\n\n" + _LOADS.format(trust=_TRUST)


FORMS: dict[str, Callable[[Any, Any, Path, str], str]] = {
    "transformers": _native,
    "remote-code": _remote_code,
    "gguf": _gguf,
    "lora": _lora,
    "merged": _merged,
}


def _write_card(folder: Path, out: Path, used: str) -> None:
    """The model's own card, with how this form is used in place of how ours is."""
    from huggingface_hub import ModelCardData

    own = folder / "README.md"
    old = own.read_text(encoding="utf-8") if own.is_file() else ""
    data = ModelCardData(library_name="transformers", pipeline_tag="image-text-to-text", tags=["sparsight"])
    head = re.match(r"---\n.*?\n---\n", old, re.DOTALL)
    title = re.search(r"^# .*$", old, re.MULTILINE)
    made = re.search(r"^A vision-language model made of .* trained with Sparsight", old, re.MULTILINE)
    _, found, rest = old.partition("\n## How it was trained\n")
    parts = (
        head[0] if head else f"---\n{data}\n---\n",
        title[0] if title else f"# {folder.name}",
        (made[0] if made else "A vision-language model that was composed with Sparsight") + f", {used}",
    )
    (out / "README.md").write_text("\n".join(parts[:2]) + f"\n\n{parts[2]}\n{found}{rest}", encoding="utf-8")
