"""Exported models give the original's logits where Sparsight cannot be imported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraModel
from transformers import InternVLVisionConfig, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig

from sparsight.console import Console
from sparsight.errors import UserError
from sparsight.modeling.quantised import save_model
from sparsight.pipeline.export import export_model
from tiny import ask, make_image, make_language, make_vlm

pytestmark = pytest.mark.long
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
SIGLIP = SiglipVisionConfig(patch_size=8, image_size=64, **SIZES)
INTERNVL = InternVLVisionConfig(patch_size=8, image_size=64, **SIZES)
MODELS = {
    "mlp": {"bridge": "mlp"},  # two feature levels
    "linear": {"bridge": "linear", "vision_levels": [2], "image_size": 96},  # positions are interpolated
    "pixel_shuffle": {"bridge": "pixel_shuffle", "vision": INTERNVL, "vision_levels": [3]},
    "chain_of_sight": {},
    "efficientnet": {"bridge": "1:4,2:1"},
    "siglip": {"bridge": "mlp", "vision": SIGLIP, "vision_levels": [3]},
}
# Run where Sparsight is absent: logits of every folder, and what its processor makes of the same image and text.
ABSENT = """
import json, sys
class Absent:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "sparsight":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
found = {}
for folder, trust in json.loads(sys.argv[1]).items():
    trust = {"trust_remote_code": True} if trust else {}
    model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    inputs = torch.load(folder + "/../inputs.pt")
    image = Image.open(folder + "/../image.png")
    own = processor(images=[image], text=inputs.pop("text"), return_tensors="pt", add_special_tokens=False)
    assert own["input_ids"].equal(inputs["input_ids"]) and own["pixel_values"].equal(inputs["pixel_values"])
    with torch.no_grad():
        found[folder] = type(model).__name__, model(**inputs).logits
    if trust:  # what was loaded so is saved so
        model.save_pretrained(folder + "/../again")
        processor.save_pretrained(folder + "/../again")
        AutoModelForImageTextToText.from_pretrained(folder + "/../again", **trust)
assert "sparsight" not in sys.modules
torch.save(found, sys.argv[2])
"""


def saved(root, name, **options):
    """A model's folder, and beside it the logits of a question with its inputs."""
    options = MODELS[name] | options
    if name == "efficientnet":
        from sparsight.modeling.configuration import EfficientNetLiteConfig

        options["vision"] = EfficientNetLiteConfig(image_size=64)
    model, processor = make_vlm(**options)
    folder = root / name / "saved"
    for part in (model, processor):
        part.save_pretrained(folder)
    make_image().save(root / name / "image.png")
    inputs = dict(ask(processor, make_image(), "How many apples?"))
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many apples?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    torch.save(inputs | {"text": text}, root / name / "inputs.pt")
    with torch.no_grad():
        return folder, model(**inputs).logits


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """By form and model: the class that loads it, its logits without Sparsight, and the original's."""
    root, logits, folders = tmp_path_factory.mktemp("exported"), {}, {}
    for name in ("mlp", "linear", "pixel_shuffle", "chain_of_sight", "efficientnet"):
        folder, logits[name] = saved(root, name)
        for form in ("transformers", "remote-code") if len(MODELS[name]) > 1 or name == "mlp" else ("remote-code",):
            if (form, name) != ("remote-code", "mlp"):
                folders[str(export_model(folder, root / name / form, form, Console(quiet=True)))] = form, name
    modules = {"HF_MODULES_CACHE": str(root / "modules")}
    given = json.dumps({folder: form == "remote-code" for folder, (form, _) in folders.items()})
    command = [sys.executable, "-c", ABSENT, given, str(root / "found.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | modules)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(root / "found.pt")
    return {folders[folder]: (*each, logits[folders[folder][1]], folder) for folder, each in found.items()}


@pytest.mark.parametrize("name", ["mlp", "linear", "pixel_shuffle"])
def test_a_class_of_transformers_gives_the_same_bits(exported, name):
    kind, found, wanted, _ = exported["transformers", name]
    assert kind == ("InternVL" if name == "pixel_shuffle" else "VipLlava") + "ForConditionalGeneration"
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["linear", "pixel_shuffle", "chain_of_sight", "efficientnet"])
def test_remote_code_gives_the_same_bits(exported, name):
    kind, found, wanted, folder = exported["remote-code", name]
    assert kind == "SparsightForConditionalGeneration" and torch.equal(found, wanted)
    source = (Path(folder) / "modeling_sparsight.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from) sparsight", source, re.MULTILINE) and "Apache-2.0" in source
    assert ("EfficientNet" in source) == (name == "efficientnet")  # nothing that the model does not reach
    assert (Path(folder).parent / "again" / "modeling_sparsight.py").read_text(encoding="utf-8") == source


def test_the_card_says_how_the_form_is_loaded(exported):
    for (form, name), (*_, folder) in exported.items():
        card = (Path(folder) / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\n") and "library_name: transformers" in card
        assert ("trust_remote_code=True" in card) == (form == "remote-code"), name
        assert "pip install sparsight" not in card


@pytest.mark.parametrize(
    ("name", "form", "said"),
    [
        ("chain_of_sight", "transformers", "no place for a bridge of kind chain_of_sight"),
        ("efficientnet", "gguf", "no place for a bridge of kind chain_of_sight"),
        ("siglip", "transformers", "none of its classes has a bridge of kind mlp with a norm.* 0 tokens before"),
        ("mlp", "gguf", r"feature levels \[2, 3\]: its LLaVA graph has no norm where several are joined"),
        ("linear", "gguf", "CLIPVisionModel: its LLaVA graph leaves out a patch where a class token is"),
        ("pixel_shuffle", "gguf", "its graphs that fold patches put <img> tokens around an image"),
        ("mlp", "lora", "no adapters; give a model that was trained with lora.keep"),
        ("mlp", "onnx", "--to onnx: expected one of transformers, remote-code, gguf, lora, merged"),
    ],
)
def test_what_a_form_cannot_express_is_refused(tmp_path, name, form, said):
    folder, _ = saved(tmp_path, name)
    with pytest.raises(UserError, match=said):
        export_model(folder, tmp_path / "out", form, Console(quiet=True))
    assert not list(tmp_path.glob("out*"))


def test_adapters_alone_and_merged(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base, _ = saved(tmp_path, "mlp")
    model, processor = make_vlm("mlp")
    inside = [n for n, m in model.named_modules() if ".language_model." in n and isinstance(m, torch.nn.Linear)]
    LoraModel(model, LoraConfig(r=2, target_modules=inside, init_lora_weights=False), "default")
    model._hf_peft_config_loaded = True
    inputs = ask(processor, make_image(), "How many apples?")
    with torch.no_grad():
        wanted = model.eval()(**inputs).logits
        assert (wanted - AutoModelForImageTextToText.from_pretrained(base)(**inputs).logits).abs().max() > 1e-3
    save_model(model, tmp_path / "adapted")
    processor.save_pretrained(tmp_path / "adapted")
    with pytest.raises(UserError, match="adapters beside its weights; merge them first, by --to merged"):
        export_model(tmp_path / "adapted", tmp_path / "native", "transformers", Console(quiet=True))
    lora, merged = (
        export_model(tmp_path / "adapted", tmp_path / form, form, Console(quiet=True)) for form in ("lora", "merged")
    )
    assert not (merged / "adapter_config.json").exists() and not (lora / "model.safetensors").exists()
    found = [
        PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), lora),
        AutoModelForImageTextToText.from_pretrained(merged),
    ]
    with torch.no_grad():
        errors = [(each.eval()(**inputs).logits - wanted).abs().max().item() for each in found]
    assert errors[0] == 0 and errors[1] <= 1e-5, errors  # measured 0, 1e-7


def gguf_model(root, **options):
    language, tokenizer = make_language()
    if options.pop("llama", False):
        torch.manual_seed(3)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer) + 6, tie_word_embeddings=True)
        language = LlamaForCausalLM(config)
    folder, _ = saved(root, "siglip", language=language, tokenizer=tokenizer, **options)
    return folder, export_model(folder, root / "gguf", "gguf", Console(quiet=True))


def test_gguf_holds_the_weights(tmp_path):
    """As llama.cpp's graph multiplies them; `benchmarks/llamacpp.py` asks llama.cpp itself."""
    gguf = pytest.importorskip("gguf")
    folder, out = gguf_model(tmp_path, bridge="linear", llama=True)
    from sparsight.pipeline import load

    model, processor = load(folder)
    vision, language = (
        {tensor.name: torch.tensor(tensor.data.copy()) for tensor in gguf.GGUFReader(out / file).tensors}
        for file in ("mmproj.gguf", "language.gguf")
    )
    bridge, x = model.model.multi_modal_projector, torch.randn(5, 32)
    normed = torch.nn.functional.layer_norm(x, (32,), vision["v.post_ln.weight"], vision["v.post_ln.bias"])
    hidden = torch.nn.functional.gelu(normed @ vision["mm.0.weight"].T + vision["mm.0.bias"], approximate="tanh")
    error = hidden @ vision["mm.2.weight"].T + vision["mm.2.bias"] - bridge.proj(bridge.norm(x))
    assert error.abs().max() <= 1e-5  # measured 5e-7: gelu(x) - gelu(-x) = x
    assert {int(name.split(".")[2]) for name in vision if ".blk." in name} == {0, 1, 2}  # up to the feature level
    rows = model.model.language_model.layers[0].self_attn.q_proj.weight.unflatten(0, (4, 2, 8))
    assert torch.equal(language["blk.0.attn_q.weight"].unflatten(0, (4, 8, 2)), rows.transpose(1, 2))
    assert "output.weight" not in language and len(language["token_embd.weight"]) == len(processor.tokenizer) + 6
    fields = gguf.GGUFReader(out / "language.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[: len(processor.tokenizer)] == processor.tokenizer.convert_ids_to_tokens(range(len(tokens) - 6))


def test_the_help_names_every_form():
    from typer.testing import CliRunner

    from sparsight.cli import app
    from sparsight.pipeline.export import FORMS

    help_text = re.sub(r"\s+", " ", CliRunner().invoke(app, ["export", "--help"]).output)
    assert all(form in help_text for form in FORMS)
