"""What differs between the versions of transformers that Sparsight runs with.

Each entry names the version that made it needed. Of these, `attach` needs the name of the cache alone.
"""

from __future__ import annotations

from typing import Any, NoReturn

import transformers
from packaging.version import Version

FOUND = Version(transformers.__version__).release

# 5.24 renamed `past_key_values` to `cache`: in outputs, and in the arguments of forward.
CACHE = "cache" if FOUND >= (5, 24) else "past_key_values"

# 5.21 brought `slice_logits_to_keep`, and an earlier one `SubConfigSpec`: composed models are made of both.
COMPOSING = ">=5.21,<6"


def check_composing() -> None:
    """Composed models run with the transformers that is installed.

    Raises:
        ImportError: it is too old; the message says what to install.
    """
    if FOUND < (5, 21):
        raise ImportError(
            f"transformers {transformers.__version__} is installed, but the models that Sparsight composes need "
            f'transformers{COMPOSING} (sparsight.attach does not): pip install "transformers{COMPOSING}"'
        )


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
        refused = type("Refused", (transformers.PreTrainedConfig,), methods)
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
