"""Ranks hang when one asks for a collective that another does not: here each asks alone, and all are compared."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import hypothesis
import mixes
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import gather_object
from collectives import Record, divergence, every_rank, rank_of
from families import batch_of, made
from hypothesis import HealthCheck, Phase, settings
from mixes import Mix, parted
from ranks import wrapped
from sharded import pretend
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from small_runs import Records, one_stage, train
from sparsight.data.collate import TrainingSet
from sparsight.data.sources import Sample
from sparsight.settings.methods import SkipperConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.forward import Forwards
from sparsight.training.stages import add_lora, select_trainable
from tiny import ListSource, conversation, make_vlm

NAME = "llava, clip + llama"
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
SKIPPER = {"alpha": 0.6, "epsilon": 0.0, "schedule": "constant"}


@settings(max_examples=8, derandomize=True, database=None)
@hypothesis.given(mixes.mixes(largest=4))
def test_all_ranks_ask_for_the_same(mix: Mix) -> None:
    """The long version is benchmarks/hangs.py."""
    assert parted(mix) == ""


def _by_rank(chances: Any, seed: int, *more: Any, plain: Any) -> Any:
    return plain(chances, seed + torch.distributed.get_rank(), *more)


def _smallest(found: Any) -> Mix:
    """The simplest mix in which ranks part."""
    once = settings(max_examples=60, database=None, derandomize=True, phases=[Phase.generate, Phase.shrink])
    strategy = mixes.mixes(largest=3, models=(NAME,))
    return hypothesis.find(strategy, cache(found), settings=settings(once, suppress_health_check=list(HealthCheck)))


def test_a_rank_without_a_blank_image_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsight.sparse.forward.blank_features", lambda _, like: like.new_zeros(()))
    found = _smallest(lambda mix: parted(mix) != "")
    assert found == Mix(("text", "image"), engine="fsdp2")
    assert "_allgather_base" in parted(found)


@pytest.mark.long
def test_layers_that_each_rank_draws_for_itself_are_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under DDP gradients are reduced all the same; they are not under FSDP2, where a skipped layer is not gathered."""
    from sparsight.sparse.forward import skipped_layers

    monkeypatch.setattr("sparsight.sparse.forward.skipped_layers", partial(_by_rank, plain=skipped_layers))
    found = _smallest(lambda mix: parted(mix) != "")
    assert found == Mix(("text", "text"), engine="fsdp2", skipper=True, seed=found.seed)


def test_a_composed_model_without_blank_images_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = Mix(("text", "image"), "sparsight", "fsdp2")
    assert parted(mix) == ""
    monkeypatch.setattr("sparsight.modeling.vlm.several_ranks", lambda: False)
    assert "rank 1" in parted(mix)


def test_ranks_of_a_large_world_that_are_alike_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = Mix(("text",) * 5 + ("image",) * 4, engine="fsdp2", skipper=True, steps=2)
    once = mixes.records(mix)
    with monkeypatch.context() as all_run:
        all_run.setattr(mixes, "ALL", 9)
        every = mixes.records(mix)
    assert [record.calls for record in once] == [record.calls for record in every] and once[0].calls
    assert len({id(record) for record in once}) < len({id(record) for record in every}) == 9
    monkeypatch.setattr("sparsight.sparse.forward.blank_features", lambda _, like: like.new_zeros(()))
    assert "on rank 4" in parted(mix)  # the first one that has an image in a step


STEPS = (False, True, False, True)  # whether the layer is skipped
# Collectives of each: gathers and reductions. The first time that it is skipped, a layer is gathered once.
ASKED = {"ddp": [(0, 0)] * 4, "fsdp2": [(13, 6), (12, 5), (13, 6), (11, 5)], "all gathered": [(13, 6)] * 4}


def trained(engine: str) -> tuple[list[tuple[int, int]], dict[str, torch.Tensor]]:
    """Collectives of each step of a rank of two, and weights at the end. Checked on the way: AdamW, with weight decay,
    leaves a skipped layer's weights and moments alone, also where gradients of zero are kept for the next step."""
    asked, before = [], list[torch.Tensor]()
    with rank_of(0, 2) as record:
        model = made(NAME)
        handle = attach(model, skipper=SkipperConfig(**SKIPPER))
        parallel = wrapped(model, handle, "ddp" if engine == "ddp" else "fsdp")
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.1, weight_decay=0.5)
        for step, skipped in enumerate(STEPS):
            handle.step(step, 0.0)
            handle.set_skipped([skipped and layer == 1 for layer in range(handle.parts.layers)])
            start = len(record.calls)
            parallel(**batch_of(NAME, model, (1, 0), seed=step)).loss.backward()
            calls = Counter(call.operation for call in record.calls[start:])
            asked.append((calls["_allgather_base"], calls["_reduce_scatter_base AVG"]))
            handle.clear_gradients()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            held = [_local(tensor).clone() for tensor in _state(handle.layers[1], optimizer)]
            alike = [torch.equal(a, b) for a, b in zip(before, held, strict=False)]
            assert not step or (all(alike) if skipped else not any(alike))
            before = held
        handle.detach()
        return asked, {name: _local(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_D08_a_skipped_layer_is_neither_gathered_nor_reduced_nor_updated(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit what it was with all gathers."""
    asked, weights = trained(engine)
    monkeypatch.setattr(Forwards, "_watch_gathers", lambda _: None)
    before, wanted = trained(engine)
    assert (asked, before) == (ASKED[engine], ASKED["ddp" if engine == "ddp" else "all gathered"])
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights.items())


def test_D08_in_bf16_gradients_accumulate_beside_a_layer_that_never_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate has it: weights are gathered as bf16, sums of gradients are fp32, and two micro-batches make a
    step. In the last one no layer runs: what follows is given what FSDP would have cast."""
    ends = []
    for gathers in (False, True):
        if gathers:
            monkeypatch.setattr(Forwards, "_watch_gathers", lambda _: None)
        with rank_of(0, 2):
            model = made(NAME)
            handle = attach(model, skipper=SkipperConfig(**SKIPPER))
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=True)
            for layer in handle.layers:
                fully_shard(layer, mp_policy=policy)
            parallel: Any = fully_shard(model)
            optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.1)
            for step in (0, 1, -1):
                handle.step(abs(step), 0.0)
                handle.set_skipped([layer != step for layer in range(handle.parts.layers)])
                for last in (False, True):
                    parallel.set_requires_gradient_sync(last)
                    parallel(**batch_of(NAME, model, (1, 0), seed=2 * step + last)).loss.backward()
                handle.clear_gradients()
                optimizer.step()
                optimizer.zero_grad()
            ends.append({name: _local(parameter) for name, parameter in model.named_parameters()})
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def _local(tensor: Any) -> torch.Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def _state(layer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    keys = ("step", "exp_avg", "exp_avg_sq")
    return [tensor for p in layer.parameters() for tensor in (p, *(optimizer.state[p][key] for key in keys))]


STAGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "skipper": {"skipper": SKIPPER},
    "methods": {"skipper": SKIPPER, "compressor": {"keep": 0.5}, "gradient_checkpointing": True},
    "lora": {"lora": {"rank": 2, "dropout": 0.0}, "packing": True, "skipper": SKIPPER},
}


@pytest.mark.parametrize(
    "case, engine",
    [
        ("methods", "ddp"),
        ("lora", "fsdp2"),
        *(pytest.param(*each, marks=pytest.mark.long) for each in product(("plain", "skipper"), ("ddp", "fsdp2"))),
        pytest.param("methods", "fsdp2", marks=pytest.mark.long),
        pytest.param("lora", "ddp", marks=pytest.mark.long),
    ],
)
def test_all_ranks_of_sparsight_train_ask_for_the_same(
    case: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage of `sparsight train`, in which some ranks have text alone."""
    records = staged(case, engine, 3, tmp_path, monkeypatch)
    assert divergence(records) == "" and len(records[0].calls) > 4


def test_D08_sparsight_train_gathers_no_skipped_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for gathers in (False, True):
        if gathers:
            monkeypatch.setattr(Forwards, "_watch_gathers", lambda _: None)
        first = staged("skipper", "fsdp2", 2, tmp_path / f"{gathers}", monkeypatch)[0]
        found.append(Counter(call.operation for call in first.calls))
    fewer = found[1] - found[0]
    assert not found[0] - found[1]
    assert fewer == {"_allgather_base": 1, "_reduce_scatter_base AVG": 1}  # a layer in one of the steps; see above


def staged(case: str, engine: str, ranks: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """What each rank of a stage does, from planning to the last step."""
    recipe, stage = one_stage(samples=2 * ranks, batch_size=ranks, checkpoints=0, **STAGES[case])
    # Ranks run one by one, so none sees the folder that the first one has locked: the question stays, its answer goes.
    monkeypatch.setattr("sparsight.training.checkpoints.gather_object", lambda _: gather_object([]))
    plain, processor = make_vlm()
    samples = [Sample(f"{i}", conversation(images=i % 5 % 3), tuple(range(i % 5 % 3))) for i in range(stage.samples)]
    monkeypatch.setattr(PartialState, "__init__", PartialState.__init__)
    for name, value in {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    if engine == "fsdp2":
        pretend()
        for name, value in FSDP2.items():
            monkeypatch.setenv(name, value)

    def run(rank: int) -> None:
        _forget()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        model = copy.deepcopy(plain)
        add_lora(model, stage.lora, 0)
        select_trainable(model, stage)
        if stage.gradient_checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        data, log = TrainingSet(ListSource(*samples), processor, stage.samples), Records()
        train(model, processor, recipe, stage, folder / f"{rank}", data, log=log)
        assert len(log.steps()) == 2

    try:
        return every_rank(ranks, run)
    finally:
        _forget()


def _forget() -> None:
    """accelerate keeps what it knows of ranks for as long as a process lives."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
