"""What trains in a stage is what the recipe declares, and nothing else changes by a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from small_runs import one_stage, train
from sparsight.modeling import EfficientNetLiteConfig
from sparsight.training.stages import (
    PARTS,
    add_lora,
    merge_lora,
    parameter_groups,
    part_of,
    select_trainable,
)
from tiny import make_vlm

RATES = {"vision": 1e-4, "bridge": 2e-3, "language": 1e-3}
CHOICES = [("bridge",), ("language",), ("bridge", "language"), ("vision", "bridge"), ("vision", "bridge", "language")]
LORA = {"rank": 4}


def stage_of(*parts: str, **changes: Any) -> Any:
    return one_stage(learning_rate={part: RATES[part] for part in parts}, **changes)


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def state(model: Any) -> dict[str, torch.Tensor]:
    """All parameters and buffers, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def parts_of(names: set[str]) -> set[str]:
    return {part_of(name) for name in names}


# ---------------------------------------------------------------------------------------- the decision


@pytest.mark.parametrize("parts", CHOICES)
def test_prefixes_and_gradients(tiny_vlm, parts: tuple[str, ...]) -> None:
    expected = {
        "vision": ("model.vision_tower.",),
        "bridge": ("model.multi_modal_projector.",),
        "language": ("model.language_model.", "lm_head."),
    }
    _, stage = stage_of(*parts)
    model, _ = tiny_vlm()
    select_trainable(model, stage)
    prefixes = tuple(prefix for part in parts for prefix in expected[part])
    assert trainable(model) == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def test_another_stage_takes_back_what_the_first_allowed(tiny_vlm) -> None:
    model, _ = tiny_vlm()
    select_trainable(model, stage_of("vision", "bridge", "language")[1])
    select_trainable(model, stage_of("bridge")[1])
    assert parts_of(trainable(model)) == {"bridge"}


def test_the_plan_counts_what_trains(tiny_vlm) -> None:
    model, _ = tiny_vlm()
    _, stage = stage_of("bridge", "language")
    plan = select_trainable(model, stage)
    sizes = {part: 0 for part in PARTS}
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] += parameter.numel()
    assert plan == {part: (0 if part == "vision" else size, size) for part, size in sizes.items()}
    assert sum(sizes.values()) == sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------- the optimizer's groups


def test_each_part_has_its_rate_and_vectors_are_not_decayed(tiny_vlm) -> None:
    model, _ = tiny_vlm()
    _, stage = stage_of("vision", "bridge", "language", weight_decay=0.1)
    select_trainable(model, stage)
    groups = parameter_groups(model, stage)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: list[str] = []
    for group in groups:
        names = [name_of[id(parameter)] for parameter in group["params"]]
        assert parts_of(set(names)) == {group["part"]}
        assert group["lr"] == RATES[group["part"]]
        assert all(group["weight_decay"] == (0.1 if p.ndim >= 2 else 0.0) for p in group["params"])
        seen += names
    assert sorted(seen) == sorted(trainable(model))  # each once
    assert {(group["part"], group["weight_decay"]) for group in groups} == {
        (part, decay) for part in PARTS for decay in (0.0, 0.1)
    }


def test_weight_decay_reaches_matrices_alone(tmp_path: Path, tiny_vlm) -> None:
    """Two runs that differ in weight decay alone differ in matrices alone, by lr * decay * weight."""
    after = []
    for decay in (0.0, 0.5):
        recipe, stage = stage_of("bridge", samples=4, weight_decay=decay, warmup=0, schedule="constant_with_warmup")
        model, processor = tiny_vlm()
        select_trainable(model, stage)
        start = state(model)
        train(model, processor, recipe, stage, tmp_path / str(decay))
        after.append(state(model))
    differ = changed(*after)
    bridge = {name for name in start if name.startswith(PARTS["bridge"])}
    assert differ == {name for name in bridge if start[name].ndim >= 2}
    for name in differ:
        assert torch.allclose(after[0][name] - after[1][name], RATES["bridge"] * 0.5 * start[name], atol=1e-6)


# ---------------------------------------------------------------------------------------- after real steps


@pytest.mark.parametrize("parts", CHOICES)
def test_after_two_steps_exactly_the_declared_parts_have_changed(
    tmp_path: Path, tiny_vlm, parts: tuple[str, ...]
) -> None:
    recipe, stage = stage_of(*parts, samples=8)
    model, processor = tiny_vlm()
    select_trainable(model, stage)
    before = state(model)
    train(model, processor, recipe, stage, tmp_path)
    moved = changed(before, state(model))
    assert parts_of(moved) == set(parts)
    # CLIP's last block and norm lie behind the feature levels: no gradient reaches them.
    unused = {name for name in trainable(model) if name not in moved}
    assert all("vision_tower" in name for name in unused), unused


def test_a_frozen_encoders_batch_norms_stand_still(tmp_path: Path) -> None:
    """Their statistics are buffers: freezing the parameters does not hold them."""
    model, processor = make_vlm(vision=EfficientNetLiteConfig(), image_size=64)
    recipe, stage = stage_of("bridge", "language", samples=8)
    select_trainable(model, stage)
    before = state(model)
    assert any("running_mean" in name for name in before)
    train(model, processor, recipe, stage, tmp_path)
    assert parts_of(changed(before, state(model))) == {"bridge", "language"}


# ---------------------------------------------------------------------------------------- LoRA


@pytest.fixture
def with_lora(tiny_vlm) -> tuple[Any, ...]:
    recipe, stage = stage_of("bridge", "language", lora=LORA)  # 4 steps: adapters begin to move in the third
    model, processor = tiny_vlm()
    lora = add_lora(model, stage.lora, seed=0)
    return model, processor, recipe, stage, lora


def test_adapters_sit_on_all_linear_maps_of_the_language_model_and_nowhere_else(with_lora: Any) -> None:
    """CLIP's maps have the names of Llama's (q_proj, ...): adapters must not leak into the encoder."""
    model, _, _, stage, _ = with_lora
    plan = select_trainable(model, stage)
    adapters = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert parts_of(adapters) == {"language"}
    maps = {name.split(".lora_")[0].removeprefix("model.language_model.layers.") for name in adapters}
    kinds = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    kinds |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert maps == {f"{layer}.{kind}" for layer in (0, 1) for kind in kinds}
    bridge = {name for name, _ in model.named_parameters() if name.startswith(PARTS["bridge"])}
    assert trainable(model) == adapters | bridge
    assert plan["language"][0] == sum(p.numel() for name, p in model.named_parameters() if name in adapters)


def test_while_lora_trains_only_adapters_and_bridge_change_and_after_merging_only_its_maps(
    tmp_path: Path, with_lora: Any, tiny_vlm
) -> None:
    model, processor, recipe, stage, lora = with_lora
    plain = state(tiny_vlm()[0])
    select_trainable(model, stage)
    before = state(model)
    train(model, processor, recipe, stage, tmp_path)
    assert changed(before, state(model)) == trainable(model)
    data = processor.tokenizer("How many apples?", return_tensors="pt")
    model.eval()
    with torch.no_grad():
        adapted = model(**data).logits
        merge_lora(lora)
        merged = model(**data).logits
    assert (adapted - merged).abs().max() < 1e-5  # measured: 1e-7 to 5e-7
    after = state(model)
    maps = {n for n in plain if n.startswith("model.language_model.layers.") and "_proj." in n}
    assert changed(plain, after) == maps | {name for name in plain if name.startswith(PARTS["bridge"])}


def test_lora_can_follow_lora(tmp_path: Path, with_lora: Any) -> None:
    """A merged model is an ordinary one: a second stage gets adapters of its own, and saves plain keys."""
    model, _, _, stage, lora = with_lora
    plain = {name.replace(".base_layer", "") for name in model.state_dict() if ".lora_" not in name}
    merge_lora(lora)
    assert set(model.state_dict()) == plain
    again = add_lora(model, stage.lora, seed=1)
    select_trainable(model, stage)
    assert parts_of(trainable(model)) == {"bridge", "language"}
    merge_lora(again)
    assert set(model.state_dict()) == plain


def test_adapters_come_from_the_seed_and_leave_the_global_generator_alone(tiny_vlm) -> None:
    _, stage = stage_of("language", lora=LORA)
    first = []
    for seed in (0, 0, 1):
        model, _ = tiny_vlm()
        torch.manual_seed(5)
        add_lora(model, stage.lora, seed)
        after = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(after, torch.rand(3))
        first.append({name: value for name, value in state(model).items() if ".lora_A" in name})
    assert not changed(first[0], first[1]) and changed(first[0], first[2])


def test_without_lora_nothing_is_added(tiny_vlm) -> None:
    model, _ = tiny_vlm()
    names = set(model.state_dict())
    merge_lora(add_lora(model, stage_of("language")[1].lora, seed=0))
    assert set(model.state_dict()) == names
