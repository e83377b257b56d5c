"""Folders of parts and of composed models: damaged, incomplete, of another kind, or with code of their own."""

import json
import shutil
import warnings

import pytest
from transformers import CLIPVisionModel

from small_runs import save_encoder
from sparsight.modeling.build import build, build_processor
from sparsight.modeling.scaling import scale_checkpoint
from sparsight.pipeline.files import load, load_any
from tiny import BRIDGE, clip_config, make_language

FILES = {
    "vision": ["config.json", "preprocessor_config.json", "model.safetensors"],
    "language": [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    ],
}
FILES["model"] = [
    "processor_config.json",
    *(file for file in dict.fromkeys(FILES["vision"] + FILES["language"]) if file != "preprocessor_config.json"),
]
DAMAGES = {"cut": lambda old: old[: len(old) // 2], "empty": lambda old: b"", "list": lambda old: b"[]"}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    language, tokenizer = make_language()
    language.save_pretrained(root / "language")
    tokenizer.save_pretrained(root / "language")
    save_encoder(root / "vision")
    model, processor = compose(root)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return root


@pytest.fixture
def root(originals, tmp_path):
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return tmp_path


def compose(root):
    return build(str(root / "vision"), str(root / "language"), BRIDGE)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(("part", "name"), [(part, name) for part in FILES for name in FILES[part]])
def test_F03_a_damaged_file_is_named(root, part, name, how):
    if name == "chat_template.jinja" and how != "cut":
        pytest.skip("a template too, of its kind")
    file = root / part / name
    file.write_bytes(DAMAGES[how](file.read_bytes()))
    with pytest.raises(ValueError, match=f"{name} is (cut short or )?damaged"):
        load(root / "model") if part == "model" else compose(root)
    if part == "model":
        with pytest.raises(ValueError, match=f"{name} is (cut short or )?damaged"):
            load_any(str(root / part))
        with pytest.raises(ValueError, match=f"{name} is (cut short or )?damaged"):
            scale_checkpoint(root / part, root / "new", "1:4,2:1")


@pytest.mark.parametrize("values", [{"image_mean": [0.1, 0.2, 0.3]}, {"image_processor_type": "OfNobody"}])
def test_F03_an_image_processor_that_transformers_does_not_know_is_an_error(root, values):
    (root / "vision" / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json gives no image processor: .*Unrecognized"):
        compose(root)


def test_F03_a_folder_without_an_image_processor_says_which_values_are_used(root):
    (root / "vision" / "preprocessor_config.json").unlink()
    said = r"vision .*/vision comes without .*preprocessor_config\.json.* 64 px and normalised with mean 0\.5, std 0\.5"
    with pytest.warns(UserWarning, match=said):
        compose(root)
    with pytest.warns(UserWarning, match="96 px"):
        build_processor(str(root / "vision"), make_language()[1], BRIDGE, image_size=96)
    with pytest.warns(UserWarning, match="vision CLIPVisionModel comes without"):
        build(CLIPVisionModel(clip_config()), make_language()[0], BRIDGE, tokenizer=make_language()[1])


def test_F03_who_gives_an_image_processor_or_random_weights_is_told_nothing(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, processor = compose(root)
        (root / "vision" / "preprocessor_config.json").unlink()
        build(str(root / "vision"), str(root / "language"), BRIDGE, image_processor=processor.image_processor)
        build(clip_config(), str(root / "language"), BRIDGE)


def test_F26_the_part_that_cannot_be_loaded_is_named(root):
    with pytest.raises(ValueError, match="^vision 'no/such': there is no such folder here.*cannot be loaded"):
        build("no/such", str(root / "language"), BRIDGE)
    with pytest.raises(ValueError, match="^language 'no/such': there is no such folder here.*cannot be loaded"):
        build(str(root / "vision"), "no/such", BRIDGE)
    with pytest.raises(ValueError, match="^vision '.*/language': transformers .* has no encoder|^LlamaModel|no pixels"):
        build(str(root / "language"), str(root / "language"), BRIDGE)
    with pytest.raises(ValueError, match="^language '.*/vision': it cannot be loaded"):
        build(str(root / "vision"), str(root / "vision"), BRIDGE)
    (root / "vision" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="^vision '.*/vision': it cannot be loaded: .*model.safetensors"):
        compose(root)


def test_F06_load_looks_at_the_kind_first(root):
    with pytest.raises(ValueError, match="vision: a model of type 'clip_vision_model'. Expected one that sparsight"):
        load(root / "vision")
