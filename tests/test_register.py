"""`import sparsight` is enough for transformers' Auto classes, in whatever order the two are imported."""

import subprocess
import sys

import pytest

from tiny import make_vlm


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for part in make_vlm():
        part.save_pretrained(folder)
    return folder


CHECKS = {
    "AutoConfig": "SparsightConfig",
    "AutoProcessor": "SparsightProcessor",
    "AutoModelForImageTextToText": "SparsightForConditionalGeneration",
    "AutoModel": "SparsightModel",
}


@pytest.mark.parametrize(
    "start",
    [
        "import sparsight; from transformers import AutoConfig",
        "from transformers import AutoConfig; assert AutoConfig; import sparsight",
        "from transformers import AutoModelForImageTextToText, AutoProcessor; import sparsight",
        "import sparsight.modeling.encoders",
    ],
)
def test_auto_classes_know_our_model(saved, start):
    """The first Auto class of CHECKS that is used here loads by itself, and all others after it."""
    first = start.rsplit(" ", 1)[-1]
    names = sorted(CHECKS, key=lambda name: name != first)
    code = f"{start}\nimport transformers\n" + "".join(
        f"assert type(transformers.{name}.from_pretrained({str(saved)!r})).__name__ == {CHECKS[name]!r}\n"
        for name in names
    )
    code += """
import sparsight, sparsight.modeling
assert callable(sparsight.build)
for name in sparsight.modeling.__all__:
    assert getattr(sparsight.modeling, name).__name__ == name
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
