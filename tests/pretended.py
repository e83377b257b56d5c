"""A pretended device: its tensors hold real values on the CPU, but are refused beside those of the CPU, as a GPU's are,
and what would make the host wait for a GPU is counted.

Torch knows the device as "gpu", by the key that it leaves to backends of others: nothing of CUDA has to be there.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch takes no backend that is written in Python", allow_module_level=True)
aten = torch.ops.aten
# Their sizes, or their results, are numbers that the host has to know.
NUMBERS = {"_local_scalar_dense", "nonzero", "masked_select", "masked_scatter_backward", "equal", "bincount"}
NUMBERS |= {"_unique2", "unique_dim", "unique_consecutive", "is_nonzero", "repeat_interleave"}
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
MOVED = ("_to_copy", "copy_", "copy")
SOURCES = ("sparsight", "transformers", "torch/optim", "torch/nn/utils", "accelerate", "peft")


class _Module(backend_registration._DummyBackendModule):
    def is_available(self) -> bool:  # nobody else is to take it for a device of this machine
        return False

    def device_count(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


if torch._C._get_privateuse1_backend_name() != "gpu":
    backend_registration._setup_privateuseone_for_python_backend("gpu", hook=_Hook(), backend_module=_Module())
DEVICE = torch.device("gpu", 0)
INSIDE: list[Pretended] = []  # the one that we are in


def _number(x: torch.Tensor) -> Any:
    """For `torch.tensor([...])`, which asks for numbers behind the dispatcher's back."""
    INSIDE[-1].waits.append(_place("_local_scalar_dense"))
    return x.held.item()  # type: ignore[attr-defined]


_KERNELS = torch.library.Library("aten", "IMPL")
_KERNELS.impl("_local_scalar_dense", _number, "PrivateUse1")
# Operations whose inputs autocast changes on CUDA: to its own type, to fp32, and to the widest that they have.
LOWER = "_convolution conv1d conv2d conv3d addmm bmm baddbmm einsum linear matmul mm mv scaled_dot_product_attention"
FP32 = "cosine_similarity cumsum exp layer_norm log log_softmax.int nll_loss nll_loss_nd norm.ScalarOpt_dim"
FP32 += " pow.Tensor_Scalar prod reciprocal rsqrt softmax.int sum sum.dim_IntList"
WIDEST = "addcmul dot index_put scatter_add"
_OTHERS = torch.library.Library("_", "IMPL")
_OTHERS.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def _autocast(kind: str, op: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet("AutocastPrivateUse1")):
        floats = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        to = torch.get_autocast_dtype("gpu") if kind == "lower" else torch.float32
        if kind == "widest" and all(x.dtype == torch.bfloat16 for x in floats):
            to = torch.bfloat16
        cast = partial(tree_map_only, torch.Tensor, lambda x: x.to(to) if x.is_floating_point() else x)
        return op(*cast(args), **cast(kwargs))


for kind, names in (("lower", LOWER), ("fp32", FP32), ("widest", WIDEST)):
    for name in names.split():
        op = getattr(getattr(aten, name.partition(".")[0]), name.partition(".")[2] or "default")
        _KERNELS.impl(name, partial(_autocast, kind, op), "AutocastPrivateUse1")


class OnDevice(torch.Tensor):
    """A tensor of the pretended device; ``held`` are its values."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, held.size(), **like, device=DEVICE)
        self.held = held
        return self

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    def tolist(self) -> Any:  # these do not reach the dispatcher by themselves
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert gpu:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("outside of Pretended")


class Pretended(TorchDispatchMode):
    """Within, there is a device "gpu"; ``waits`` are the places in the code that would wait for it, and ``sent`` those
    that copy to the host without a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.sent: list[str] = []

    def __enter__(self) -> Pretended:
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) is a copy from the host
        self.threads = torch.autograd.set_multithreading_enabled(False)  # exceptions would end a device's thread
        self.threads.__enter__()
        INSIDE.append(self)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self.before)
        INSIDE.pop()
        self.threads.__exit__(*args)
        super().__exit__(*args)

    def take(self) -> list[str]:
        """The waits since the last call."""
        waits, self.waits, self.sent = self.waits, [], []
        return waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, given = func._schema.name.split("::")[-1], tree_leaves((args, kwargs))
        ours = [x for x in given if isinstance(x, OnDevice)]
        hosts = [x for x in given if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice)]
        wanted = bool(ours)
        if kwargs.get("device") is not None:
            wanted = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        if func is aten._fused_sdp_choice.default:
            return 0  # the plain one, which runs everywhere
        if name in MOVED:
            wanted = isinstance(args[0], OnDevice) if name == "copy_" else wanted
            self._moved(name, args, kwargs, wanted)
        elif name in INDEXED and ours:
            self._indexed(args)
        elif ours:
            if any(x.ndim for x in hosts):
                raise RuntimeError(f"{func}: expected all tensors to be on the same device, found gpu:0 and cpu")
            if name in NUMBERS and kwargs.get("output_size") is None:
                self.waits.append(_place(name))
        args_held, kwargs_held = tree_map_only(OnDevice, _held, (args, kwargs))
        if func is aten.histc.default and not args_held[0].is_floating_point():  # as no CPU can
            args_held = (args_held[0].float(), *args_held[1:])
        found = func(*args_held, **kwargs_held)
        if name.endswith("_") and not name.startswith("_") and isinstance(found, torch.Tensor):
            return args[0]  # in place
        return tree_map_only(torch.Tensor, OnDevice, found) if wanted else found

    def _moved(self, name: str, args: Any, kwargs: dict[str, Any], wanted: bool) -> None:
        source = args[1] if name in ("copy_", "copy") else args[0]
        target = isinstance(args[0], OnDevice) if name in ("copy_", "copy") else wanted
        if isinstance(source, OnDevice) == target or (target and not source.numel()):
            return
        blocks = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
        if blocks:
            self.waits.append(_place("to the device" if target else "to the host"))
        elif not target:
            self.sent.append(_place("sent to the host"))

    def _indexed(self, args: Any) -> None:
        indices = [x for x in args[1] if x is not None]
        masks = [x for x in indices if x.dtype in (torch.bool, torch.uint8)]
        filled = len(args) > 2 and len(indices) == 1 and args[2].numel() == 1  # as masked_fill
        if masks and not filled:
            self.waits.append(_place("boolean index"))
        if any(not isinstance(x, OnDevice) for x in indices):
            self.waits.append(_place("index on the host"))
        if any(x.ndim and not isinstance(x, OnDevice) for x in args[2:3] if isinstance(x, torch.Tensor)):
            raise RuntimeError("index_put: expected all tensors to be on the same device, found gpu:0 and cpu")


def _held(x: OnDevice) -> torch.Tensor:
    return x.held


def _place(what: str) -> str:
    """What waits, and the innermost line of a library that asked for it; of a backward pass there is none."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if any(f"/{source}/" in file for source in SOURCES) and "pretended" not in file:
            short = "/".join(Path(file).parts[-2:])
            return f"{what}: {short}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return f"{what}: backward or elsewhere"


def move(model: Any) -> None:
    """The model to the pretended device, tied weights too."""
    model.to(DEVICE)
    model.tie_weights()


def on_device(found: Any) -> Any:
    """Tensors in any nest, on the pretended device; within `Pretended`."""
    return tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), found)
