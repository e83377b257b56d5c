"""What differs between the versions of transformers that Sparsight runs with.

Each entry names the version that made it needed.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import cache
from textwrap import dedent
from typing import Any, NoReturn

import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn

from sparsight.errors import UserError

FOUND = Version(transformers.__version__).release
ATTACHING = ">=5.0,<6"  # as in pyproject.toml; 4.57 has no get_encoder(modality=...)

# 5.24 renamed `past_key_values` to `cache`: in outputs, and in the arguments of forward.
CACHE = "cache" if FOUND >= (5, 24) else "past_key_values"

# 5.0 renamed the base of configurations.
BASE_CONFIG = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig

# Up to 5.3 `generate` tells decoders where tokens stand in the cache; not told, they count for themselves.
COUNTED = "cache_position"

# 5.10 brought the processors' hooks that composed models fill: `_process_images` and `replace_image_token`.
COMPOSING = ">=5.10,<6"
_IMAGES = ("pixel_values", "image_grid_thw", "mm_encoder_outputs")  # arguments of the composed model's forward


def part_specs(kinds: dict[str, str]) -> dict[str, Any]:
    """What a configuration's parts are when they name no kind: ``sub_configs_defaults``, which 5.20 brought."""
    if FOUND < (5, 20):
        return {}
    from transformers.configuration_utils import SubConfigSpec

    return {part: SubConfigSpec(config_class=transformers.AutoConfig, model_type=kind) for part, kind in kinds.items()}


def make_parts(config: Any, kinds: dict[str, str]) -> None:
    """Before 5.20, a configuration makes its parts itself."""
    for part, kind in kinds.items() if FOUND < (5, 20) else ():
        if not isinstance(given := getattr(config, part), transformers.PreTrainedConfig):
            setattr(config, part, transformers.AutoConfig.for_model(**({"model_type": kind} | (given or {}))))


def slice_logits_to_keep(hidden_BTE: Any, keep: Any) -> Any:
    """5.21 brought it, with positions of each sample; before, there are the last ones (an int), or the same for all."""
    if FOUND < (5, 21):
        return hidden_BTE[:, slice(-keep, None) if isinstance(keep, int) else keep]
    from transformers.modeling_utils import slice_logits_to_keep as theirs

    return theirs(hidden_BTE, keep)


class Generates:
    """Before 5.18, `generate` does not encode the images beforehand, and shares them out itself."""

    if FOUND < (5, 18):

        def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
            """Images go in with the prompt alone: they are in the cache afterwards."""
            inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
                *args, is_first_iteration=is_first_iteration, **kwargs
            )
            cached = not is_first_iteration and kwargs.get("use_cache", True)
            return {key: value for key, value in inputs.items() if not cached or key not in _IMAGES}

        def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:
            """Repeated image by image, not sample by sample, images would stand before another's text."""
            if expand_size > 1 and any(kwargs.get(key) is not None for key in _IMAGES):
                raise UserError(
                    f"num_beams, num_return_sequences: {expand_size} sequences of a sample with images need "
                    f"transformers>=5.18, found {transformers.__version__}; ask for 1, or install a newer one"
                )
            return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)  # type: ignore[misc]


def check_attaching() -> None:
    """Raises ImportError if `attach` does not run with the transformers that is installed; says what to install."""
    _check("sparsight.attach needs", ATTACHING)


def check_composing() -> None:
    """The same for composed models."""
    attaching = f" (sparsight.attach needs {ATTACHING})"
    _check("the models that Sparsight composes need", COMPOSING, attaching if _fits(ATTACHING) else "")


def _fits(wanted: str) -> bool:
    return SpecifierSet(wanted).contains(transformers.__version__, prereleases=True)


def _check(who: str, wanted: str, more: str = "") -> None:
    if not _fits(wanted):
        raise ImportError(
            f"transformers {transformers.__version__} is installed, but {who} transformers{wanted}{more}: "
            f'pip install "transformers{wanted}"'
        )


def returns_tuple(layer: nn.Module) -> bool:
    """Whether a decoder layer returns a tuple, hidden states first. Up to 5.3 those of Qwen, Gemma and many others do,
    since then few (Falcon, Bamba). Its source tells, as it would not do to wait for the first call: checkpointing
    recomputes calls."""
    return _returns_tuple(type(layer).forward)


@cache  # a model has many layers, of few types
def _returns_tuple(forward: Callable[..., Any]) -> bool:
    tree = ast.parse(dedent(inspect.getsource(inspect.unwrap(forward))))
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)]
    tuples = {ast.unparse(target) for node in assigned for target in node.targets}
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    first = [value.left if isinstance(value, ast.BinOp) else value for value in returned]
    return any(isinstance(value, ast.Tuple) or ast.unparse(value) in tuples for value in first)


def refuse_composed(reason: Exception, theirs: str) -> None:
    """Let an Auto class raise `reason` when a composed model, or its processor, is loaded, and not before.

    Args:
        theirs: the module of transformers that has just been loaded, ``transformers.models.auto.*_auto``. That of
            configurations is the first.
    """

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise reason

    if theirs.endswith("configuration_auto"):
        methods = {"model_type": "sparsight", "from_dict": refuse}
        refused = type("Refused", (BASE_CONFIG,), methods)
        transformers.AutoConfig.register("sparsight", refused, exist_ok=True)
        return
    # Ours or the refused one: transformers registers nothing of others under a configuration of its own.
    config = transformers.CONFIG_MAPPING["sparsight"]
    methods = {"config_class": config, "from_pretrained": refuse, "_from_config": refuse}
    if theirs.endswith("processing_auto"):  # finds processors by the name of their class
        transformers.AutoProcessor.register(config, type("SparsightProcessor", (), methods), exist_ok=True)
    else:
        for auto in (transformers.AutoModel, transformers.AutoModelForImageTextToText):
            auto.register(config, type("Refused", (), methods), exist_ok=True)
