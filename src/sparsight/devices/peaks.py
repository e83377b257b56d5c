"""Peaks and memory of devices, from their makers' data sheets, and the CPU's name and instructions. No torch."""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path

from sparsight.errors import UserError

# FLOP/s of dense bf16 matrix products with fp32 sums, and GB. The first name that a device's name contains counts.
DEVICES: dict[str, tuple[float, float]] = {
    "B200": (2250e12, 180),
    "GH200": (989e12, 96),
    "H200 NVL": (835e12, 141),
    "H200": (989e12, 141),
    "H100 PCIe": (756e12, 80),
    "H100 NVL": (835e12, 94),
    "H100": (989e12, 80),
    "A100-SXM4-40GB": (312e12, 40),
    "A100-PCIE-40GB": (312e12, 40),
    "A100": (312e12, 80),
    "A10G": (70e12, 24),
    "A10": (125e12, 24),
    "A40": (150e12, 48),
    "RTX A6000": (155e12, 48),
    "L40S": (362e12, 48),
    "L40": (181e12, 48),
    "L4": (121e12, 24),
    "RTX 6000 Ada": (364e12, 48),
    "RTX 5090": (210e12, 32),
    "RTX 4090": (165e12, 24),
    "RTX 3090": (71e12, 24),
}
# CPU features that make bf16 autocast faster than fp32.
BF16_FEATURES = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "bf16": "Arm BF16"}
MFU = 0.4  # share of the peak that `plan` assumes where nothing else is given


def _cpuinfo(*keys: str) -> str:
    """The words of Linux on the first core under one of these keys; empty elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.lower().startswith(keys)), "")


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def cpu_bf16() -> tuple[str, ...]:
    """The CPU's instructions for bf16, by name; empty where bf16 is emulated, and tens of times slower than fp32."""
    features = set(_cpuinfo("flags", "features").lower().split())
    if not features:
        import torch

        ask = getattr(torch.cpu, "get_capabilities", dict)  # newer than the oldest torch that we allow
        features = {name for name, value in ask().items() if value is True}
    return tuple(label for feature, label in BF16_FEATURES.items() if feature in features)


def known_device(name: str) -> tuple[str, float, float]:
    """(name, FLOP/s, bytes) of a device in the table.

    Raises:
        UserError: it is not there.
    """
    for known, (peak, memory) in DEVICES.items():
        if re.search(rf"(?<!\w){re.escape(known)}(?!\w)", name, re.IGNORECASE):
            return known, peak, memory * 1e9
    raise UserError(f"device '{name}' is not known; expected one of {', '.join(DEVICES)}")


def peak_flops(device: str, precision: str) -> float | None:
    """FLOP/s that a device reaches at most, from the table (bf16 alone); None if unknown."""
    try:
        return known_device(device)[1] if precision == "bf16" else None
    except UserError:
        return None
