"""ms-swift: `swift sft ... --external_plugins $(python -m sparsight.integrations.ms_swift) --callbacks sparsight`.

A plugin can add no arguments there, as these are parsed before it is loaded. So the settings stand in the environment
variable SPARSIGHT, which `--model_kwargs '{"SPARSIGHT": {"compressor": {"keep": 0.25}}}'` sets, too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from sparsight.errors import UserError
from sparsight.integrations import callback_from
from sparsight.sparse.callback import SparsightCallback

VARIABLE = "SPARSIGHT"


def make_callback(args: Any, trainer: Any) -> SparsightCallback:
    """What ms-swift makes of `--callbacks sparsight`.

    Raises:
        UserError: there are no settings, or wrong ones, or ms-swift cuts sequences over ranks.
    """
    if not (settings := os.environ.get(VARIABLE)):
        raise UserError(
            f"--callbacks sparsight: no settings in the environment variable {VARIABLE}; give "
            f'--model_kwargs \'{{"{VARIABLE}": {{"compressor": {{"keep": 0.25}}}}}}\', or set the variable'
        )
    template = getattr(trainer, "template", None)
    if (ranks := getattr(template, "sequence_parallel_size", 1)) > 1:
        raise UserError(
            f"--sequence_parallel_size {ranks}: each rank has a part of every sequence, and visual tokens cannot be "
            "chosen from a part; set it to 1"
        )
    return callback_from(settings, VARIABLE)


def register() -> None:
    """Make `--callbacks sparsight` known to ms-swift, in whose process this runs."""
    from swift.callbacks import callbacks_map  # type: ignore[import-not-found]

    callbacks_map["sparsight"] = make_callback


if __name__ == "__main__":
    sys.stdout.write(f"{Path(__file__).absolute()}\n")
elif not __package__:  # loaded as a file, by ms-swift, which has put the folder on the path: its files hide packages
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).absolute().parent)]
    register()
