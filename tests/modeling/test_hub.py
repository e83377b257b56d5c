"""What Sparsight saves is loaded by a process that has it installed, and never imported it."""

import json
import os
import re
from pathlib import Path

import pytest

import sparsight
from sparsight.modeling import SparsightConfig, SparsightForConditionalGeneration, SparsightProcessor
from sparsight.modeling.configuration import EfficientNetLiteConfig
from sparsight.modeling.efficientnet_lite import EfficientNetLiteModel
from sparsight.reporting import Run, write_card
from sparsight.settings.load import builtin_recipe, load_recipe
from tiny import make_image, make_vlm

SOURCE = str(Path(sparsight.__file__).parents[1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "vlm"
    for part in make_vlm():
        part.save_pretrained(folder)
    return folder


# What Python says where it is not installed, also where an editable install puts it on the path.
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "sparsight":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def run_fresh(fresh, code, cwd, tmp_path, absent=False):
    """Run ``code`` in a process of its own, as it is run where Sparsight is installed, or (``absent``) is not."""
    code = (ABSENT if absent else "") + code
    environment = os.environ | {"PYTHONPATH": SOURCE, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    return fresh.run(code, cwd=cwd, env=environment)


def loads(fresh, code, cwd, tmp_path):
    result = run_fresh(fresh, code, cwd, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


LOAD = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
assert "sparsight" not in sys.modules
trust = {"trust_remote_code": True}
"""


def test_F19_a_saved_folder_loads_without_import(fresh, saved, tmp_path):
    loads(
        fresh,
        LOAD
        + """
model = AutoModelForImageTextToText.from_pretrained(".", **trust)
assert type(model).__module__ == "sparsight.modeling.vlm", type(model)
assert type(AutoProcessor.from_pretrained(".", **trust)).__module__ == "sparsight.modeling.processing"
model.save_pretrained("../again")  # what was loaded so is saved so
""",
        saved,
        tmp_path,
    )
    loads(fresh, LOAD + 'AutoModelForImageTextToText.from_pretrained(".", **trust)', saved.parent / "again", tmp_path)
    stubs = sorted(path.name for path in (saved.parent / "again").glob("*.py"))
    assert stubs == ["modeling_sparsight.py"]


@pytest.mark.parametrize(
    "first, expected",
    [
        ("AutoConfig", "SparsightConfig"),
        ("AutoProcessor", "SparsightProcessor"),
        ("AutoModel", "SparsightModel"),
        ("AutoTokenizer", "TokenizersBackend"),
    ],
)
def test_F19_each_auto_class_loads_first(fresh, saved, tmp_path, first, expected):
    loads(
        fresh,
        LOAD + f'found = type({first}.from_pretrained(".", **trust)).__name__\nassert found == "{expected}", found',
        saved,
        tmp_path,
    )


def test_F19_a_pipeline_answers(fresh, saved, tmp_path):
    make_image().save(tmp_path / "image.png")
    loads(
        fresh,
        f"""
from transformers import pipeline
ask = pipeline("image-text-to-text", ".", trust_remote_code=True)
content = [{{"type": "image", "image": {str(tmp_path / "image.png")!r}}}, {{"type": "text", "text": "What is it?"}}]
found = ask(text=[{{"role": "user", "content": content}}], max_new_tokens=3)
assert found[0]["generated_text"][-1]["role"] == "assistant"
""",
        saved,
        tmp_path,
    )


def test_F19_trl_takes_the_folder(fresh, saved, tmp_path):
    pytest.importorskip("trl")
    loads(
        fresh,
        f"""
from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer
rows = [{{
    "images": [Image.new("RGB", (64, 64))],
    "prompt": [{{"role": "user", "content": "How many?"}}],
    "completion": [{{"role": "assistant", "content": "12 apples."}}],
}}] * 2
arguments = SFTConfig(
    {str(tmp_path / "out")!r}, max_steps=1, per_device_train_batch_size=2, max_length=None, use_cpu=True,
    report_to="none", save_strategy="no", trust_remote_code=True, bf16=False,
)
trainer = SFTTrainer(".", args=arguments, train_dataset=Dataset.from_list(rows))
assert type(trainer.model).__name__ == "SparsightForConditionalGeneration"
trainer.train()
""",
        saved,
        tmp_path,
    )


def test_F19_where_sparsight_is_absent_the_error_says_what_to_install(fresh, saved, tmp_path):
    for name in ("AutoModelForImageTextToText", "AutoProcessor"):
        result = run_fresh(
            fresh,
            f'from transformers import {name}; {name}.from_pretrained(".", trust_remote_code=True)',
            saved,
            tmp_path,
            True,
        )
        assert result.returncode != 0
        assert "pip install sparsight" in result.stderr, result.stderr[-2000:]


def test_F19_with_sparsight_imported_nobody_is_asked_to_trust(fresh, saved, tmp_path):
    loads(
        fresh,
        """
import sparsight
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline
assert type(AutoModelForImageTextToText.from_pretrained(".")).__module__ == "sparsight.modeling.vlm"
assert type(AutoProcessor.from_pretrained(".")).__name__ == "SparsightProcessor"
config = AutoConfig.from_pretrained(".")
assert type(AutoModelForImageTextToText.from_config(config)).__module__ == "sparsight.modeling.vlm"
pipeline("image-text-to-text", ".")
""",
        saved,
        tmp_path,
    )


def test_F19_an_encoder_of_ours_loads_alone(fresh, tmp_path):
    EfficientNetLiteModel(EfficientNetLiteConfig(image_size=64)).save_pretrained(tmp_path / "encoder")
    loads(
        fresh,
        LOAD + 'assert type(AutoModel.from_pretrained(".", **trust)).__name__ == "EfficientNetLiteModel"',
        tmp_path / "encoder",
        tmp_path,
    )


@pytest.mark.parametrize("which", ["config", "processor", "model"])
def test_F19_each_part_is_saved_with_the_module_that_it_names(tmp_path, which):
    model, processor = make_vlm()
    {"config": model.config, "processor": processor, "model": model}[which].save_pretrained(tmp_path)
    file = tmp_path / ("processor_config.json" if which == "processor" else "config.json")
    names = json.loads(file.read_text(encoding="utf-8"))["auto_map"]
    module, _, _ = next(iter(names.values())).partition(".")
    namespace: dict = {}
    exec((tmp_path / f"{module}.py").read_text(encoding="utf-8"), namespace)
    ours = {SparsightConfig, SparsightForConditionalGeneration, SparsightProcessor, sparsight.modeling.SparsightModel}
    assert {namespace[name.partition(".")[2]] for name in names.values()} <= ours


def test_F19_a_scaled_checkpoint_loads_without_import(fresh, saved, tmp_path):
    old = tmp_path / "old"  # one that was saved before there were stubs
    old.mkdir()
    for path in saved.iterdir():
        if path.suffix == ".json":
            values = json.loads(path.read_text(encoding="utf-8"))
            values.pop("auto_map", None)
            (old / path.name).write_text(json.dumps(values), encoding="utf-8")
        elif path.suffix != ".py":
            (old / path.name).write_bytes(path.read_bytes())
    sparsight.scale_checkpoint(old, tmp_path / "new", "1:4,2:4")
    loads(fresh, LOAD + 'AutoModelForImageTextToText.from_pretrained(".", **trust)', tmp_path / "new", tmp_path)


def test_F19_the_snippet_of_the_card_runs_as_printed(fresh, saved, tmp_path):
    write_card(saved, load_recipe(builtin_recipe("paper-7b.yaml")), Run("r", {}, [], {}, {}, {}, {}, [], []))
    snippets = re.findall(r"```python\n(.*?)```", (saved / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 1
    loads(fresh, snippets[0] + "\nassert model and processor", saved, tmp_path)
