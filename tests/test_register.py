"""`import sparsight` is enough for transformers' Auto classes, in whatever order the two are imported."""

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
def test_auto_classes_know_our_model(fresh, saved, start):
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
    result = fresh.run(code)
    assert result.returncode == 0, result.stderr[-2000:]


def test_F11_a_transformers_too_old_for_composed_models_works_as_without_us(fresh, saved):
    """Its Auto classes import and load, attach imports, and who asks for a composed model is told what to install."""
    code = f"""
import pytest, transformers
transformers.__version__ = "5.9.0"
import sparsight
from transformers import AutoModelForImageTextToText, AutoConfig, AutoProcessor, Trainer
assert sparsight.attach and sparsight.SparsightCallback
asked = [
    lambda: sparsight.build,
    lambda: AutoConfig.from_pretrained({str(saved)!r}),
    lambda: AutoModelForImageTextToText.from_pretrained({str(saved)!r}),
    lambda: AutoProcessor.from_pretrained({str(saved)!r}),
]
for ask in asked:
    with pytest.raises(ImportError, match='5.9.0 is installed, but .* need .*>=5.10,<6.*pip install'):
        ask()
"""
    result = fresh.run(code)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("found", ["4.40.2", "6.0.0"])
def test_a_transformers_that_attach_cannot_take_is_told_in_one_sentence(fresh, found):
    """transformers itself works as without us."""
    code = f"""
import pytest, transformers
transformers.__version__ = "{found}"
import sparsight
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Trainer
for name in ("attach", "find_parts", "SparsightCallback", "build"):
    with pytest.raises(ImportError, match='^transformers {found} is installed, but .* need.*,<6: pip install "[^"]*"$'):
        getattr(sparsight, name)
"""
    result = fresh.run(code)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    "broken, autos", [("encoders", "AutoModel, AutoModelForImageTextToText"), ("processing", "AutoProcessor,")]
)
def test_F11_what_fails_in_our_modules_is_told_to_who_asks_for_a_composed_model(fresh, saved, broken, autos):
    """It was swallowed: "Unrecognized configuration class", or another processor without a word."""
    code = f"""
import sys, pytest
sys.modules["sparsight.modeling.{broken}"] = None
import sparsight
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
assert type(AutoConfig.from_pretrained({str(saved)!r})).__name__ == "SparsightConfig"
for auto in ({autos}):
    with pytest.raises(ImportError, match="import of sparsight.modeling.{broken} halted"):
        auto.from_pretrained({str(saved)!r})
"""
    result = fresh.run(code)
    assert result.returncode == 0, result.stderr[-2000:]
