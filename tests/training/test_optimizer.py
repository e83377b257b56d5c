"""Muon for the matrices inside, AdamW for all else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from small_runs import one_stage, train
from sparsight.cost import Trains
from sparsight.training import optimizer as optimizers
from sparsight.training.counter import StepCounter
from sparsight.training.optimizer import MuonAdamW, optimizer_flops
from sparsight.training.stages import add_lora, merge_lora, parameter_groups, select_trainable
from sparsight.training.trainer import SparsightTrainer, training_arguments

SETTINGS = {"betas": (0.9, 0.98), "lr": 1e-3, "fused": True}


def _grouped(tiny_vlm, **changes):
    _, stage = one_stage(optimizer="muon", **changes)
    model, _ = tiny_vlm()
    select_trainable(model, stage)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None
    return model, parameter_groups(model, stage)


def test_linear_maps_take_muon_and_nothing_else_does(tiny_vlm) -> None:
    model, groups = _grouped(tiny_vlm)
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon = {names[p] for group in groups if group["muon"] for p in group["params"]}
    others = {names[p] for group in groups if not group["muon"] for p in group["params"]}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in muon
    assert "model.multi_modal_projector.proj.weight" in muon
    assert all(name.endswith(".weight") and "norm" not in name for name in muon)
    assert {"model.language_model.embed_tokens.weight", "model.multi_modal_projector.proj.bias"} <= others
    assert any("queries" in name for name in others) and not muon & others


@pytest.mark.parametrize("fast", [True, False], ids=["bf16", "bf16 emulated"])
def test_a_step_is_torchs_own_muon_and_adamw(tiny_vlm, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """One optimizer does what the two do, also with a schedule that sets its rates, and behind a checkpoint; where bf16
    is emulated, Muon's in fp32, but for rounding."""
    monkeypatch.setattr(optimizers, "fast_bf16", lambda device: fast)
    model, groups = _grouped(tiny_vlm, weight_decay=0.1)
    optimizer = MuonAdamW(groups, **SETTINGS)
    other, own = _grouped(tiny_vlm, weight_decay=0.1)
    muon = torch.optim.Muon([g for g in own if g["muon"]], adjust_lr_fn="match_rms_adamw", ns_steps=3)
    adamw = torch.optim.AdamW([g for g in own if not g["muon"]], **SETTINGS)
    for factor in (1.0, 0.5, 0.25):
        for group in optimizer.param_groups:
            group["lr"] *= factor
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] *= factor
        optimizer.step()
        muon.step()
        adamw.step()
        fresh = MuonAdamW(parameter_groups(model, one_stage(optimizer="muon")[1]), **SETTINGS)
        fresh.load_state_dict(optimizer.state_dict())
        optimizer = fresh
    pairs = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    differences = {name: float((mine - theirs).abs().max()) for (name, mine), theirs in pairs}
    assert max(differences.values()) < 1e-4  # of updates of 2e-3; measured: 3e-5
    assert (max(differences.values()) == 0) == fast
    muons = {id(parameter) for group in groups if group["muon"] for parameter in group["params"]}
    assert all(differences[name] == 0 for name, parameter in model.named_parameters() if id(parameter) not in muons)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("changes, beta2", [({}, 0.98), ({"adam_beta2": 0.9}, 0.9)])
def test_F07_adamws_second_moments_decay_as_the_stage_says(
    tmp_path: Path, tiny_vlm, optimizer: str, changes: dict, beta2: float
) -> None:
    """The moments themselves: of gradients that are all alike, g, they are (1 - beta2 ** steps) g ** 2."""
    _, stage = one_stage(optimizer=optimizer, **changes)
    model, _ = tiny_vlm()
    select_trainable(model, stage)
    arguments = training_arguments(one_stage()[0], stage, 4, tmp_path)
    settings = {"stage": stage, "plan": [], "counter": StepCounter(model, Trains.of(stage), 1e6)}
    made = SparsightTrainer(model, arguments, **settings).create_optimizer()
    parameter = model.model.multi_modal_projector.proj.bias
    for _ in range(3):
        parameter.grad = torch.full_like(parameter, 0.5)
        made.step()
    torch.testing.assert_close(made.state[parameter]["exp_avg_sq"], torch.full_like(parameter, (1 - beta2**3) / 4))


def test_flops_are_what_torch_counts(tiny_vlm) -> None:
    _, groups = _grouped(tiny_vlm)
    optimizer = MuonAdamW(groups, **SETTINGS)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert optimizer_flops(optimizer) == counter.get_total_flops() > 0


def test_a_torch_without_muon_is_told(tiny_vlm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, groups = _grouped(tiny_vlm)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="needs torch 2.9 or newer, found"):
        MuonAdamW(groups)


def test_adapters_alone_train_without_muons_part(tmp_path: Path, tiny_vlm) -> None:
    """With LoRA there is no matrix for Muon, which takes no empty list."""
    model, processor = tiny_vlm()
    recipe, stage = one_stage(optimizer="muon", lora={"rank": 2}, learning_rate={"language": 1e-2}, samples=8)
    lora = add_lora(model, stage.lora, recipe.seed)
    select_trainable(model, stage)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    train(model, processor, recipe, stage, tmp_path)
    assert before and all((p != before[name]).any() for name, p in model.named_parameters() if name in before)
    merge_lora(lora)
