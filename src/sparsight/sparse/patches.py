"""Patches of modules that neither copies of these nor files hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, update_wrapper
from typing import Any


class Held:
    """Held by a module: called, it is ``call``. In a copy of the module, or a pickle, ``instead`` stands in its stead.

    A closure would not do: copies of functions are the functions themselves, and go on acting on the original.
    """

    def __init__(self, call: Callable[..., Any], instead: Any) -> None:
        if callable(instead):
            update_wrapper(self, instead)  # transformers reads signatures
        self.call, self.instead = call, instead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.instead, memo)  # a bound method becomes that of its owner's copy

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (self.instead,)


@cache
def keep_out_of_graphs() -> None:
    """Let torch.compile break its graphs at our wrappers: each choice of skipped layers would be a graph of its own."""
    from torch._dynamo import trace_rules  # transformers' models have loaded it by then

    trace_rules.add("sparsight.sparse")


def hook(call: Callable[..., Any]) -> Held:
    """A hook of a module; its copy does nothing, and needs no Sparsight to be loaded."""
    return Held(call, nullcontext().__exit__)
