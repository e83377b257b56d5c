"""Exported models give the original's logits where Sparsight cannot be imported."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, InternVLVisionConfig, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig

from sparsight.console import Console
from sparsight.errors import UserError
from sparsight.modeling.quantised import save_model
from sparsight.pipeline.export import export_model
from tiny import ask, make_image, make_language, make_vlm

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
# Forms and models that are loaded where Sparsight is absent; more of them in the long tests.
SHORT = (("transformers", "mlp"), ("remote-code", "chain_of_sight"))
MORE = (
    *(("transformers", name) for name in ("linear", "pixel_shuffle")),
    *(("remote-code", name) for name in ("linear", "pixel_shuffle", "efficientnet", "siglip")),
    *((form, "adapted") for form in ("lora", "merged")),
)


def made(name, **options):
    options = MODELS[name] | options
    if name == "efficientnet":
        from sparsight.modeling.configuration import EfficientNetLiteConfig

        options["vision"] = EfficientNetLiteConfig(image_size=64)
    model, processor = make_vlm(**options)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # a fresh model's norms are all alike, and so are its biases
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, processor


def saved(root, name, **options):
    """A model's folder, and beside it the logits of a question with its inputs."""
    model, processor = made(name, **options)
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


def adapted(root):
    """The folder of a model with adapters, a remote-code one of the model below them, and logits with them."""
    saved(root, "mlp")
    model, processor = made("mlp")
    inside = [n for n, m in model.named_modules() if ".language_model." in n and isinstance(m, torch.nn.Linear)]
    LoraModel(model, LoraConfig(r=2, lora_alpha=6, target_modules=inside, init_lora_weights=False), "default")
    model._hf_peft_config_loaded = True
    save_model(model, root / "mlp" / "adapted")
    processor.save_pretrained(root / "mlp" / "adapted")
    inputs = torch.load(root / "mlp" / "inputs.pt")
    inputs.pop("text")
    with torch.no_grad():
        wanted = model.eval()(**inputs).logits
    return root / "mlp" / "adapted", export(root / "mlp" / "saved", root / "mlp" / "base", "remote-code"), wanted


def export(folder, out, form):
    return export_model(folder, out, form, Console(quiet=True))


def exports(root, pairs):
    """A task of `without_sparsight` for each pair of a form and a model, and the original's logits."""
    logits, tasks = {}, {}
    for form, name in pairs:
        if form in ("lora", "merged"):
            if name not in logits:
                *folders, logits[name] = adapted(root / name)
            out = export(folders[0], root / name / "mlp" / form, form)
            if form == "lora":
                tasks[form, name] = (str(folders[1]), True, str(out))
            else:  # ours, and so exported once more
                tasks[form, name] = str(export(out, root / name / "mlp" / "merged-remote", "remote-code")), True, ""
        else:
            if name not in logits:
                _, logits[name] = saved(root, name)
            out = export(root / name / "saved", root / name / form, form)
            tasks[form, name] = str(out), form == "remote-code", ""
    return tasks, logits


def load_without_sparsight(tasks, root, python=sys.executable):
    """By task: the class, logits and sameness of inputs that it found, or why it did not load."""
    root.mkdir(exist_ok=True)
    command = [str(python), Path(__file__).with_name("without_sparsight.py"), json.dumps([*tasks.values()])]
    modules = {"HF_MODULES_CACHE": str(root / "modules")}
    out = root / "found.pt"
    done = subprocess.run([*command, out], capture_output=True, text=True, timeout=400, env=os.environ | modules)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(tasks, torch.load(out), strict=True))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Of a pair: the class that loads it, its logits without Sparsight, the original's, and its folder."""

    @cache
    def batch(pairs):
        root = tmp_path_factory.mktemp("exported")
        tasks, logits = exports(root, pairs)
        found = load_without_sparsight(tasks, root)
        assert all(len(each) == 3 and each[2] for each in found.values()), found  # loaded, with the same inputs
        return {pair: (kind, own, logits[pair[1]], Path(tasks[pair][0])) for pair, (kind, own, _) in found.items()}

    return lambda pair: batch(next(pairs for pairs in (SHORT, MORE) if pair in pairs))[pair]


def each(form):
    return [name for of, name in SHORT if of == form] + [
        pytest.param(name, marks=pytest.mark.long) for of, name in MORE if of == form
    ]


@pytest.mark.parametrize("name", each("transformers"))
def test_a_class_of_transformers_gives_the_same_bits(exported, name):
    kind, found, wanted, folder = exported(("transformers", name))
    assert kind == ("InternVL" if name == "pixel_shuffle" else "VipLlava") + "ForConditionalGeneration"
    assert torch.equal(found, wanted)
    check_card(folder, "transformers")


@pytest.mark.parametrize("name", each("remote-code"))
def test_remote_code_gives_the_same_bits(exported, name):
    kind, found, wanted, folder = exported(("remote-code", name))
    assert kind == "SparsightForConditionalGeneration" and torch.equal(found, wanted)
    source = (folder / "modeling_sparsight.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from) sparsight", source, re.MULTILINE) and "Apache-2.0" in source
    assert '\n_check("this model needs", COMPOSING)\n' in source  # before anything of a newer transformers
    assert ("EfficientNet" in source) == (name == "efficientnet")  # nothing that the model does not reach
    assert (folder.parent / "again" / "modeling_sparsight.py").read_text(encoding="utf-8") == source
    check_card(folder, "remote-code")


@pytest.mark.long
@pytest.mark.parametrize(("form", "allowed"), [("lora", 0.0), ("merged", 1e-5)])  # measured 0, 1e-7
def test_adapters_alone_and_merged(exported, form, allowed):
    _, found, wanted, _ = exported((form, "adapted"))
    assert (found - wanted).abs().max() <= allowed


def check_card(folder, form):
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "library_name: transformers" in card
    assert ("trust_remote_code=True" in card) == (form == "remote-code")
    assert "pip install sparsight" not in card


@pytest.mark.long
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
        export(folder, tmp_path / "out", form)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.long
def test_adapters_must_be_merged_first(tmp_path):
    folder, *_ = adapted(tmp_path)
    with pytest.raises(UserError, match="adapters beside its weights; merge them first, by --to merged"):
        export(folder, tmp_path / "native", "transformers")
    lora, merged = (export(folder, tmp_path / form, form) for form in ("lora", "merged"))
    assert not (merged / "adapter_config.json").exists() and not (lora / "model.safetensors").exists()


def gguf_model(root, **options):
    language, tokenizer = make_language()
    if options.pop("llama", False):
        torch.manual_seed(3)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer) + 6, tie_word_embeddings=True)
        language = LlamaForCausalLM(config)
    folder, _ = saved(root, "siglip", language=language, tokenizer=tokenizer, **options)
    return folder, export(folder, root / "gguf", "gguf")


def llava_graph(tensors, settings, pixels):
    """What llama.cpp computes of an image; in its projector it approximates GELU, which is left out here."""

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x, name):
        eps = settings("attention.layer_norm_epsilon")
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    patches = F.conv2d(
        pixels, *(tensors[f"v.patch_embd.{kind}"] for kind in ("weight", "bias")), settings("patch_size")
    )
    x = patches.flatten(2).mT + tensors["v.position_embd.weight"]
    for layer in range(settings("block_count")):
        block, heads = f"v.blk.{layer}", settings("attention.head_count")
        h = norm(x, f"{block}.ln1")
        q, k, v = (linear(h, f"{block}.attn_{each}").unflatten(-1, (heads, -1)).transpose(1, 2) for each in "qkv")
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(h, f"{block}.attn_out")
        h = F.gelu(linear(norm(x, f"{block}.ln2"), f"{block}.ffn_up"), approximate="tanh")
        x = x + linear(h, f"{block}.ffn_down")
    return linear(F.gelu(linear(norm(x, "v.post_ln"), "mm.0")), "mm.2")


@pytest.mark.long
@pytest.mark.parametrize(("bridge", "llama"), [("linear", True), ("mlp", False)])
def test_gguf_computes_the_same(tmp_path, bridge, llama):
    """Its encoder and bridge in llama.cpp's graph, and its language model as transformers reads GGUF;
    `benchmarks/llamacpp.py` asks llama.cpp itself."""
    gguf = pytest.importorskip("gguf")
    folder, out = gguf_model(tmp_path, bridge=bridge, llama=llama)
    from sparsight.pipeline import load

    model, processor = load(folder)
    reader = gguf.GGUFReader(out / "mmproj.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    pixels = torch.load(tmp_path / "siglip" / "inputs.pt")["pixel_values"]
    width = model.config.text_config.head_dim  # which transformers' reader of Qwen3 does not look for
    read = AutoModelForCausalLM.from_pretrained(out, gguf_file="language.gguf", head_dim=width)
    ids = torch.arange(40)[None] * 7 % len(processor.tokenizer)
    with torch.no_grad():
        visual = llava_graph(tensors, lambda key: reader.fields[f"clip.vision.{key}"].contents(), pixels)
        error = (visual - model.get_image_features(pixels).pooler_output).abs().max()
        assert error <= 1e-5, error  # measured 1e-6
        assert (read(ids).logits - model(input_ids=ids).logits).abs().max() <= 1e-5  # measured 5e-7
    fields = gguf.GGUFReader(out / "language.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    count = len(processor.tokenizer)
    assert tokens[:count] == processor.tokenizer.convert_ids_to_tokens(range(count))
    assert len(tokens) == model.config.text_config.vocab_size


def test_the_help_names_every_form():
    from typer.testing import CliRunner

    from sparsight.cli import app
    from sparsight.pipeline.export import FORMS

    help_text = re.sub(r"\s+", " ", CliRunner().invoke(app, ["export", "--help"]).output)
    assert all(form in help_text for form in FORMS)
