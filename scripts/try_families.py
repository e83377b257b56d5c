"""Try `sparsight.attach` on every image-text family of the installed transformers, from tiny random models.

Writes docs/families.md, and exits with 1 if any family crashed. I images, T positions.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from sparsight.compat import BASE_CONFIG
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.parts import find_parts

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
WORDS, VOCABULARY, WIDTH, SIDE, PATCH = 60, 128, 64, 64, 8
# The first pattern that fits a field's name says its value; a number below stays as it is.
SIZES: list[tuple[str, Any]] = [
    (r".*vocab_size(_per_layer_input)?", VOCABULARY),
    (r"num_hidden_layers|num_layers|n_layers|depth|layers|(encoder|decoder)_layers", 4),
    (r"(.*_)?num_key_value_heads|.*num_global_key_value_heads", 1),
    (r".*heads", 2),
    (r".*head_dim|d_kv", 32),
    (r"image_size|img_size|.*posemb_size|position_embedding_size", SIDE),
    (r"patch_size", PATCH),
    (r"(.*_)?num_experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
    (r".*experts_per_tok|moe_topk|moe_k", 2),
    (r"n_group|topk_group", 1),
    (r"mm_tokens_per_image", 16),
    (r"pooling_kernel_size", 2),
    (r"image_grid_pinpoints", SIDE),
    (r".*_rank", 16),
    (r"max_position_embeddings|max_source_positions", 512),
    (r".*(_size|_dim|_channels|d_model|d_ff|_latents|num_query_tokens|hidden_sizes)", WIDTH),
]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def mrope(*sections: int) -> dict[str, Any]:
    """Multimodal rotary embedding, for families whose code has sections for large heads."""
    return {"rope_parameters": ROPE | {"mrope_section": list(sections)}}


# What cannot be told from a field's name: settings by family, and by the kind of a part.
SPECIAL: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {64: 16}},
    "blip_2_qformer": {"hidden_size": WIDTH},
    "chameleon": {"vocabulary_map": {"<image>": WORDS - 1}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2},
    "dots3_note_text": {"layer_types": ["indexed_attention"] * 4},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "emu3": {"vocabulary_map": {"<image>": WORDS - 1, "<|extra_200|>": WORDS - 2}},
    "ernie4_5_vl_moe_text": mrope(5, 5, 6),
    "gemma3n_text": {"intermediate_size": WIDTH, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4},
    "glm4v_text": mrope(4, 6, 6),
    "glm4v_moe_text": mrope(2, 3, 3),
    "glm_ocr_text": mrope(4, 6, 6),
    "granite4_vision": {
        "downsample_rate": "2/4",
        "deepstack_layer_map": [(-1, 0), (-2, 1)],
        "spatial_target_layers": [2, 3],
    },
    "hunyuan_vl_text": mrope(4, 4, 4, 4) | {"head_dim": 32},
    "llama4_vision_model": {"intermediate_size": 4 * WIDTH},
    "paddleocr_vl_text": mrope(4, 6, 6),
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": WIDTH,
                "depth": 2,
                "num_heads": 2,
                "img_size": [SIDE, SIDE],
                "patch_size": PATCH,
            }
            | {"ref_feat_shape": [8, 8], "global_pool": ""},
        }
    },
    "qwen2_vl_text": mrope(4, 6, 6),
    "qwen2_5_vl_text": mrope(4, 6, 6),
    "qwen2_5_omni_text": mrope(4, 6, 6),
    "qwen2_5_omni_thinker": {"vision_start_token_id": WORDS - 1},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": WORDS - 1},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "step3p5": {"sliding_window": 64},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "molmo2_adapter": {"vision_feature_layer": [3, 2]},
    "muse_glimmer": {"out_hidden_size": 4 * WIDTH},
    "muse_spark": {"out_hidden_size": 4 * WIDTH},
    "nemotron_h": {"n_groups": 1},
    "timm_wrapper": {"architecture": "fastvit_t8", "hidden_size": 768},
    "vipllava": {"vision_feature_layers": [-2, -1]},
}
# Parts that a family has only if asked for.
ASKED = {
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "gemma4_unified": {"vision_config": {"model_type": "gemma4_unified_vision"}},
}
REASONS = {
    "diffusion_gemma": "it denoises blocks of text, so it has no next-token loss",
    "evolla": "it reads proteins, not images",
    "instructblipvideo": "it takes videos alone",
}


STYLES = {"works": "green", "compressor only": "cyan", "refused": "yellow", "not tried": "dim", "crashed": "bold red"}
HEADING = """# Families

What `sparsight.attach` does with each of the {all} image-text families of transformers {version}, tried by
`python scripts/try_families.py` on tiny models with random weights, an image and a few words a sample, on a CPU:
{told}.

- **works**: with keep 1.0 and alpha 0, loss and gradients are bit by bit those of the plain model. With keep 0.5 and
  half of the layers off, the pass is shorter, loss and gradients are finite, and the layers that run get gradients, no
  others. A sample gives the same alone as beside a longer one.
- **compressor only**: the same, but `attach` refuses to skip layers, for the reason given.
- **refused**: `attach` raises ValueError with the reason given.
- **not tried**: no tiny model, or no batch for it, could be made here. It may work.

A dropped token is gone: in recurrent layers (linear attention, Mamba, short convolutions) what follows it moves up, and
its decay is not applied. Experts see the kept tokens alone; the loss that balances them
(`output_router_logits=True`) is refused while tokens are dropped, as it counts all positions.

| family | | what was seen |
|---|---|---|
"""


class Outcome(NamedTuple):
    """``status`` is one of `STYLES`."""

    name: str
    status: str
    detail: str


# ------------------------------------------------------------------------------------------------- tiny models


def shrunk(config: Any) -> dict[str, Any]:
    """Arguments that make a tiny one of this kind of config: every size is cut, parts too."""
    small: dict[str, Any] = {"model_type": config.model_type} if config.model_type else {}
    usual = vars(type(config)())  # a part may differ from it, as the whole wants it
    for key, value in vars(config).items():
        if isinstance(value, BASE_CONFIG):
            small[key] = shrunk(value)
        elif key == "rope_parameters" and isinstance(value, dict):
            small[key] = rope(value, vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads)
        elif key == "num_key_value_heads" and value == vars(config).get("num_attention_heads"):
            small[key] = 2
        elif isinstance(value, (int, list, tuple)) and not isinstance(value, bool) and fits(key):
            small[key] = sized(key, value)
        elif isinstance(value, (bool, int, float, str)) and not key.startswith("_") and value != usual.get(key):
            small[key] = value
    return small | SPECIAL.get(config.model_type, {})


def fits(key: str) -> Any:
    """The small value for a field of this name, if it is a size."""
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), None)


def sized(key: str, value: Any) -> Any:
    """The small value of a field; lists keep their length."""
    if isinstance(value, int):
        return min(value, fits(key))
    return type(value)(sized(key, v) if isinstance(v, (int, list, tuple)) else v for v in value)


def rope(parameters: dict[str, Any], head: int) -> dict[str, Any]:
    """Sections of a multimodal rotary embedding, in proportion to the small head; all else as it was."""
    if any(isinstance(value, dict) for value in parameters.values()):
        return {key: rope(value, head) for key, value in parameters.items()}
    if (sections := parameters.get("mrope_section")) is None:
        return parameters
    few = [max(1, section * 32 // head) for section in sections]
    few[-1] += sum(sections) * 32 // head - sum(few)
    return parameters | {"mrope_section": few}


def tokens(settings: dict[str, Any], config: Any, known: dict[str, int]) -> None:
    """Ids of special tokens that lie outside the small vocabulary, or that are unset, put at its end, parts too."""
    for key, value in vars(config).items():
        if isinstance(value, BASE_CONFIG):
            tokens(settings.setdefault(key, {}), value, known)
            continue
        outside = isinstance(value, int) and value >= WORDS
        visual = re.fullmatch(r"(image|video|audio)_token_(id|index)", key)
        if visual or (outside and re.fullmatch(r".*(token|im_.*|image_patch)_(id|index)", key)):
            name = key.removesuffix("_index").removesuffix("_id")
            settings.setdefault(key, known.setdefault(name, WORDS + len(known)))


def made(name: str) -> Any:
    """A tiny model of a family with random weights, in training mode."""
    default = CONFIG_MAPPING[name](**ASKED.get(name, {}))
    settings = shrunk(default)
    tokens(settings, default, {})
    settings.pop("model_type", None)
    config = CONFIG_MAPPING[name](**settings)
    config.get_text_config().pad_token_id = 0
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    if (count := sum(p.numel() for p in whole.parameters())) > 2e7:
        raise ValueError(f"still {count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # start values of 0.02 would make all layers nearly nothing
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


# ------------------------------------------------------------------------------------------------------ batches


def images(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Two images in every shape that the model's arguments allow, the likeliest first."""
    taken = set(inspect.signature(model.forward).parameters)
    vision = getattr(model.config, "vision_config", model.config)
    patch = getattr(vision, "patch_size", PATCH)
    patch = patch if isinstance(patch, int) else patch[-1]
    side = SIDE // PATCH
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    square, mask = noise(2, 3, SIDE, SIDE), torch.ones(2, side * side, dtype=torch.long)
    sizes, shapes = torch.tensor([[SIDE, SIDE]] * 2), torch.tensor([[side, side]] * 2)
    patches = 2 * side * side
    if grids := {"image_grid_thw", "image_grid_hw"} & taken:
        grid = {"image_grid_thw": torch.tensor([[1, side, side]] * 2), "image_grid_hw": shapes}
        more = {key: grid[key] for key in grids}
        if "image_merge_sizes" in taken:
            more["image_merge_sizes"] = torch.tensor([2, 2])
        for times in (getattr(vision, "temporal_patch_size", 1), getattr(vision, "patch_temporal", 1)):
            yield {"pixel_values": noise(patches, 3 * times * patch * patch), **more}
        yield {"pixel_values": noise(patches, 3, patch, patch), **more}
        halves = {"image_grid_thw": grid["image_grid_thw"] // torch.tensor([1, 2, 2])}
        yield {"pixel_values": noise(patches // 4, 2 * patch, 2 * patch, 3), **halves}
    if "image_token_pooling" in taken:
        yield {  # the same image twice, pooled by the same places
            "pixel_values": noise(1, side * side, 3 * patch * patch).repeat(2, 1, 1),
            "image_token_pooling": torch.arange(side * side).view(-1, 4).repeat(2, 1),
            "image_grids": torch.tensor([[side // 2, side // 2, 0, 0]] * 2),
            "image_num_crops": torch.ones(2, dtype=torch.long),
        }
    if "pixel_attention_mask" in taken:
        yield {"pixel_values": square[:, None]}
        yield {"pixel_values": square[:, None], "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool)}
        flat = noise(2, side * side, 3 * patch * patch)
        yield {"pixel_values": flat, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if "image_sizes" in taken:
        yield {"pixel_values": square[:, None].repeat(1, 2, 1, 1, 1), "image_sizes": sizes}
        yield {"pixel_values": square, "image_sizes": sizes}
    if "image_position_ids" in taken:
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1).expand(2, -1, -1)
        yield {"pixel_values": noise(2, side * side, 3 * patch * patch), "image_position_ids": places}
        yield {"pixel_values": noise(2, side * side, 12 * patch * patch), "image_position_ids": places}
    yield {"pixel_values": square}
    yield {"pixel_values": square[:, None]}
    yield {"pixel_values": square, "high_res_pixel_values": noise(2, 3, SIDE, SIDE)}
    yield {"pixel_values": noise(1, 3, patch, patches * patch), "target_sizes": shapes}
    yield {"pixel_values": square, "qformer_input_ids": torch.full((2, 3), 5)}


def features_of(model: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Images that the model takes, and how many positions each has."""
    inner = model if hasattr(model, "get_image_features") else getattr(model, "model", model)
    if not hasattr(inner, "get_image_features"):
        raise ValueError("no get_image_features to ask for the number of visual tokens")
    told = []
    for pixels in images(model):
        try:
            with torch.no_grad():
                found = inner.get_image_features(**pixels)
        except Exception as error:
            told.append(f"{'x'.join(map(str, pixels['pixel_values'].shape))}: {one_line(error)}")
            continue
        features = getattr(found, "pooler_output", found)
        if features is None:  # llama4; granite4_vision adds features of each level to a layer of its own
            features = found.deepstack_features[0][1] if "deepstack_features" in found else found.last_hidden_state
        if isinstance(features, torch.Tensor) and features.ndim == 2:
            return pixels, [len(features) // 2] * 2
        return pixels, [int(image.shape[-2]) for image in features]
    raise ValueError("; ".join(told))


def batch_of(model: Any) -> dict[str, torch.Tensor]:
    """Two samples of unequal length with an image and words each; the words at the end are learnt."""
    pixels, counts = features_of(model)
    config, generator = model.config, torch.Generator().manual_seed(1)
    image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if image is None:
        raise ValueError("no id of a visual token in the config")

    def words(number: int) -> list[int]:
        return torch.randint(4, WORDS - 4, (number,), generator=generator).tolist()

    rows = [words(2) + [image] * count + words(5 + sample) for sample, count in enumerate(counts)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    learnt = (ids != image) & mask.bool() & (torch.arange(longest) > 2)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~learnt, -100), **pixels}
    taken = inspect.signature(model.forward).parameters
    kinds = {"mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"} & set(taken)
    return batch | {kind: (ids == image).long() for kind in kinds}


# --------------------------------------------------------------------------------------------------- the trials


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one pass."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def skipper_for(model: Any) -> tuple[SkipperConfig | None, str]:
    """Half of the layers skipped, or None and the reason if this family's layers cannot be skipped."""
    skipper = SkipperConfig(alpha=0.5, epsilon=0.0, schedule="constant")
    try:
        attach(model, skipper=skipper).detach()
    except ValueError as error:
        return None, one_line(error)
    return skipper, ""


def check_dense(model: Any, batch: dict[str, torch.Tensor], skipper: SkipperConfig | None) -> None:
    """Keep 1.0 and alpha 0 are the plain model, bit by bit."""
    loss, grads = gradients(model, batch)
    none_off = skipper and SkipperConfig(alpha=0.0, epsilon=0.0)
    handle = attach(model, CompressorConfig(keep=1.0), none_off)
    same_loss, same_grads = gradients(model, batch)
    handle.detach()
    assert handle.take_passes(), "the decoder was not called with visual tokens"
    assert torch.equal(loss, same_loss) and grads.keys() == same_grads.keys(), "keep 1.0 is not the plain model"
    assert all(torch.equal(grad, same_grads[key]) for key, grad in grads.items()), "keep 1.0 has other gradients"


def check_sparse(model: Any, batch: dict[str, torch.Tensor], skipper: SkipperConfig | None) -> str:
    """Keep 0.5, with half of the layers off, makes the pass shorter; loss and gradients are finite."""
    handle = attach(model, CompressorConfig(keep=0.5), skipper)
    handle.set_skipped([skipper is not None and number % 2 == 1 for number in range(handle.parts.layers)])
    loss, grads = gradients(model, batch)
    (done,) = handle.take_passes()
    handle.detach()
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values()), "loss or gradients not finite"
    assert done.length < done.length_in and done.visual_out < done.visual_in, f"not shorter: {done}"
    path = handle.parts.decoder + ".layers."
    reached = {int(key.removeprefix(path).split(".")[0]) for key in grads if key.startswith(path)}
    assert reached == {n for n, off in enumerate(handle.skipped) if not off}, f"gradients in layers {sorted(reached)}"
    assert any(key.startswith(handle.parts.vision + ".") for key in grads), "no gradient in the vision tower"
    return f"{done.length_in} positions, {done.length} kept; {done.layers_run} of {handle.parts.layers} layers"


@torch.no_grad()
def check_alone(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """A sample gives the same alone, without padding, as beside another: padding does not reach recurrent states."""
    batch = {key: value for key, value in batch.items() if key != "labels"}
    lengths = batch["attention_mask"].sum(1).tolist()

    def worst() -> float:
        together, found = model(**batch).logits, 0.0
        for sample, length in enumerate(lengths):
            alone = {key: value.chunk(2, -1 if len(value) == 1 else 0)[sample] for key, value in batch.items()}
            shape = alone["input_ids"].shape
            alone |= {key: value[:, :length] for key, value in alone.items() if value.shape[:2] == shape}
            difference = together[sample, :length] - model(**alone).logits[0]
            found = max(found, float(difference.abs().max() / together.abs().max()))
        return found

    model.eval()
    plain = worst()
    handle = attach(model, CompressorConfig(keep=0.5), train_only=False)
    sparse = worst()
    handle.detach()
    model.train()
    assert sparse <= max(1e-4, 2 * plain), f"a sample is changed by its neighbour: {sparse:.1e}, plain {plain:.1e}"


def tried(model: Any, batch: dict[str, torch.Tensor]) -> tuple[str, str]:
    """Status and detail; raises AssertionError where a promise is broken, ValueError if attach refuses."""
    skipper, reason = skipper_for(model)
    check_dense(model, batch, skipper)
    detail = check_sparse(model, batch, skipper)
    check_alone(model, batch)
    return ("works", detail) if skipper else ("compressor only", f"{detail}; {reason}")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def outcome_of(name: str) -> Outcome:
    """Try one family."""
    if name in REASONS:
        return Outcome(name, "not tried", REASONS[name])
    try:
        model = made(name)
    except ImportError as error:
        return Outcome(name, "not tried", f"needs a package that is not installed: {one_line(error)}")
    except Exception as error:
        return Outcome(name, "not tried", f"does not build from a tiny config: {one_line(error)}")
    try:
        find_parts(model, needs_vision=True)
    except ValueError as error:
        return Outcome(name, "refused", one_line(error))
    try:
        batch = batch_of(model)
        gradients(model, batch)
    except Exception as error:
        return Outcome(name, "not tried", f"no batch could be made: {one_line(error)}")
    try:
        return Outcome(name, *tried(model, batch))
    except ValueError as error:
        return Outcome(name, "refused", one_line(error))
    except Exception as error:
        return Outcome(name, "crashed", f"{type(error).__name__}: {one_line(error)}")


def outcomes(names: Iterable[str] = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)) -> Iterator[Outcome]:
    """Try these families, by default all that transformers has."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from map(outcome_of, names)


def page(found: list[Outcome]) -> str:
    """The results as Markdown."""
    counts = Counter(outcome.status for outcome in found)
    rows = [f"| {name} | {status} | {detail.replace('|', chr(92) + '|')} |" for name, status, detail in found]
    told = ", ".join(f"{counts[status]} {status}" for status in STYLES if counts[status])
    return HEADING.format(version=transformers.__version__, all=len(found), told=told) + "\n".join(rows) + "\n"


def main() -> int:
    """Returns 1 if a family crashed, 2 for names that transformers does not have."""
    names = sys.argv[1:] or list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    if unknown := sorted(set(names) - set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)):
        print(f"not an image-text family of transformers {transformers.__version__}: {', '.join(unknown)}")
        return 2
    table = Table("family", "", "")
    found = []
    for outcome in track(outcomes(names), "families", len(names), transient=True):
        found.append(outcome)
        table.add_row(outcome.name, f"[{STYLES[outcome.status]}]{outcome.status}", escape(outcome.detail))
    Console().print(table)
    if not sys.argv[1:]:
        PAGE.write_text(page(found))
    return int(any(outcome.status == "crashed" for outcome in found))


if __name__ == "__main__":
    sys.exit(main())
