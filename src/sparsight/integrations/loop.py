"""For trainers with a loop of their own that knows no callbacks: the optimizer's hooks tell where training stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsight.errors import UserError
from sparsight.sparse.attach import SparseHandle


def follow(handle: SparseHandle, optimizers: Any | Sequence[Any], steps: int, start: int = 0) -> None:
    """Call `SparseHandle.step` and `SparseHandle.clear_gradients` around each step of the optimizer.

    Args:
        handle: from `sparsight.attach`.
        optimizers: torch's, or several, which step one after the other.
        steps: optimizer steps of the whole training.
        start: steps that were done before, in a run that is resumed.

    Raises:
        UserError: an optimizer has no hooks, or there are no steps.
    """
    if steps < 1:
        raise UserError(f"steps {steps}: expected the number of optimizer steps of the whole training")
    each = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
    for optimizer in each:
        if not hasattr(optimizer, "register_step_post_hook"):
            raise UserError(f"{type(optimizer).__name__} has no register_step_post_hook: expected torch's optimizer")
        optimizer.register_step_pre_hook(lambda *_: handle.clear_gradients())
    done = start

    def stepped(*_: Any) -> None:
        nonlocal done
        done += 1
        handle.step(done, min(1.0, done / steps))

    each[-1].register_step_post_hook(stepped)
    handle.step(start, min(1.0, start / steps))
