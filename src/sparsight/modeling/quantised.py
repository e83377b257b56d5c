"""Language models whose frozen weights are packed, and models whose adapters stay beside their weights.

A packed weight is in fewer elements than it has parameters; bitsandbytes' are in ``uint8`` or ``int8``.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsight.errors import UserError
from sparsight.modeling.folders import loading, read_json

_MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
ADAPTERS = "adapter_config.json"


def check_installed(package: str, extra: str, user: str) -> None:
    """Raises UserError, with what to install, where a package is missing that ``user`` needs."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{user} needs {package}, which is not installed: pip install 'sparsight[{extra}]'")


def check_packages(folder: Path) -> None:
    """Raises UserError where a saved model needs a package that is not installed: without peft, transformers would
    leave out its adapters in silence."""
    if (folder / ADAPTERS).is_file():
        check_installed("peft", "lora", f"{folder}: a model with adapters")
    if read_json(folder / "config.json").get("quantization_config"):
        check_installed("bitsandbytes", "quant", f"{folder}: a quantised model")


def quantised_language(
    name: str, quantization: str, precision: str, layers: int | None = None
) -> tuple[nn.Module, Any]:
    """A causal language model with packed linear maps, all else in ``precision``, and its tokenizer.

    Args:
        name: a folder or hub id; quantization: "nf4" or "int8"; precision: "fp32" or "bf16".

    Raises:
        UserError: it cannot be loaded, is quantised in another way already, or bitsandbytes is missing.
    """
    check_installed("bitsandbytes", "quant", f"quantization: {quantization}")
    from transformers import BitsAndBytesConfig

    dtype, four = torch.float32 if precision == "fp32" else torch.bfloat16, quantization == "nf4"
    packing = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype} if four else {}
    config = BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four, **packing)
    extra = {} if layers is None else {"num_hidden_layers": layers}
    with loading("language", name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            name, quantization_config=config, dtype=dtype, trust_remote_code=False, **extra
        )
    if not getattr(model, "is_loaded_in_4bit" if four else "is_loaded_in_8bit", False):
        raise UserError(f"language '{name}' is quantised already, and not as {quantization}: give it as it was before")
    return model, tokenizer


def take_packing(model: Any, language: Any) -> None:
    """Let a model that was composed around a language model of bitsandbytes save and load as that one does."""
    if (packing := vars(language.config).pop("quantization_config", None)) is None:
        return
    for name in _MARKS:
        if name in vars(language):
            setattr(model, name, getattr(language, name))
    inside = (name for name, module in model.named_modules() if type(module) is nn.Linear)
    kept = [name for name in inside if name.startswith("model.language_model.")]
    packing.llm_int8_skip_modules = ["model.vision_tower", "model.multi_modal_projector", "lm_head", *kept]
    model.config.quantization_config = packing


def count(parameter: nn.Parameter) -> int:
    """Elements of a parameter before it was packed."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """The model with its layers as they are below adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, module in found.items():
        model.set_submodule(name, module.get_base_layer())
    model._hf_peft_config_loaded = False
    try:
        yield
    finally:
        model._hf_peft_config_loaded = True
        for name, module in found.items():
            model.set_submodule(name, module)


def save_model(model: Any, folder: Path) -> None:
    """`save_pretrained`; of a model that keeps adapters, these (as peft does) and the weights below them, side by side:
    then the folder is found whole by ``from_pretrained``."""
    adapted = getattr(model, "_hf_peft_config_loaded", False)
    if adapted or getattr(model, "is_quantized", False):
        vars(model).pop("_weight_conversions", None)  # how they were loaded: transformers cannot undo it to pack again
    model.save_pretrained(folder)  # with adapters, of these alone
    if adapted:
        with without_adapters(model):
            model.save_pretrained(folder)
