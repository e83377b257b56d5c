"""What differs between the versions of transformers that Sparsight runs with.

Each entry names the version that made it needed.
"""

from __future__ import annotations

import ast
import inspect
from textwrap import dedent
from typing import Any, NoReturn

import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn

FOUND = Version(transformers.__version__).release
ATTACHING = ">=5.0,<6"  # as in pyproject.toml; 4.57 has no get_encoder(modality=...)

# 5.24 renamed `past_key_values` to `cache`: in outputs, and in the arguments of forward.
CACHE = "cache" if FOUND >= (5, 24) else "past_key_values"

# 5.0 renamed the base of configurations.
BASE_CONFIG = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig

# Up to 5.3 `generate` tells decoders where tokens stand in the cache; not told, they count for themselves.
COUNTED = "cache_position"

# 5.21 brought `slice_logits_to_keep`, and an earlier one `SubConfigSpec`: composed models are made of both.
COMPOSING = ">=5.21,<6"


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
    tree = ast.parse(dedent(inspect.getsource(inspect.unwrap(type(layer).forward))))
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
