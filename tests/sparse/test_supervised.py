"""``supervised_logits_only``: the loss and gradients of all logits, from those that it is taken on."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from families import CONFIGS, FAMILIES, batch_of, made
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from sparsight.settings.methods import CompressorConfig
from sparsight.sparse.attach import NoEffectWarning, attach

NAME = "llava, clip + llama"


def step(model: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and how many positions went through the vocabulary's projection."""
    rows: list[int] = []
    seen = model.get_output_embeddings().register_forward_hook(lambda _, __, found: rows.append(found[..., 0].numel()))
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    seen.remove()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, sum(rows)


def check_equal(found: Any, wanted: Any) -> None:
    assert torch.allclose(found[0], wanted[0], rtol=1e-6) and found[1].keys() == wanted[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted[1].values())
    for name, gradient in found[1].items():
        error = float((gradient - wanted[1][name]).abs().max())
        assert error <= 1e-6 * largest, (name, error / largest)  # measured: up to 2e-7


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(name: str) -> None:
    """Rows of different lengths; with the sum over all micro-batches that the Trainer asks for, and with the mean."""
    model = made(name)
    batch = batch_of(name, model, (2, 1) if name != "paligemma" else (1, 1))
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    for asked in ({}, {"num_items_in_batch": torch.tensor(5 * supervised)}):
        wanted = step(model, batch | asked)
        handle = attach(model, supervised_logits_only=True)
        found = step(model, batch | asked)
        check_equal(found, wanted)
        assert (found[2], wanted[2]) == (supervised, batch["labels"].numel())
        assert [done.labels for done in handle.take_passes()] == [supervised]
        handle.detach()
        assert step(model, batch | asked)[2] == wanted[2] and "_loss_function" not in model.__dict__


def test_beside_the_compressor_and_for_labels_that_are_shifted_already() -> None:
    model = made(NAME)
    batch = batch_of(NAME, model, (1, 2))
    shifted = batch | {"shift_labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)}
    found = []
    for only in (False, True):
        handle = attach(model, CompressorConfig(keep=0.5), supervised_logits_only=only)
        found += [step(model, batch), step(model, shifted)]
        handle.detach()
    for one, other in zip(found[2:], found[:2], strict=True):
        check_equal(one, other)
        assert (one[2], other[2]) == (8, batch["labels"].numel())


def test_logits_are_all_there_in_eval_mode_and_said_to_be_missing_in_training() -> None:
    model = made(NAME)
    batch = batch_of(NAME, model)
    attach(model, supervised_logits_only=True)
    for output in (model(**batch), model(**batch, return_dict=False)):
        logits = output[1] if isinstance(output, tuple) else output.logits
        with pytest.raises(AttributeError, match="logits.shape: with supervised_logits_only there are no logits"):
            logits.shape  # noqa: B018
    assert model.eval()(**batch).logits.shape[:2] == batch["labels"].shape
    twin = copy.deepcopy(model).train()
    assert twin(**batch).logits.shape[:2] == batch["labels"].shape


def test_a_loss_that_needs_all_logits_is_refused() -> None:
    model = made(NAME)
    model.loss_function = lambda logits, labels, **_: ForCausalLMLoss(logits, labels, logits.shape[-1])
    before = set(model.__dict__)
    with pytest.raises(ValueError, match="needs the logits of all positions: supervised_logits_only expects"):
        attach(model, CompressorConfig(), supervised_logits_only=True)
    assert set(model.__dict__) == before
    del model._loss_function
    attach(model, supervised_logits_only=True).detach()


def test_in_the_trainer_and_with_smoothed_labels_which_need_all_logits(tmp_path) -> None:
    """Weights after training are those of the plain model; where the Trainer takes its loss by itself, that is said."""
    weights, told = [], []
    for only, smoothing in ((False, 0.0), (True, 0.0), (True, 0.1)):
        model = made(NAME)
        if only:
            attach(model, supervised_logits_only=True)
        items = [{key: value[row] for key, value in batch_of(NAME, model, (1, 1)).items()} for row in (0, 1)] * 2
        settings = {"output_dir": str(tmp_path), "max_steps": 4, "report_to": [], "save_strategy": "no"}
        arguments = TrainingArguments(**settings, disable_tqdm=True, use_cpu=True, label_smoothing_factor=smoothing)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Trainer(model, arguments, train_dataset=items).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        told.append([str(w.message) for w in caught if issubclass(w.category, NoEffectWarning)])
    assert torch.allclose(weights[0], weights[1], atol=1e-6) and not torch.allclose(weights[0], weights[2], atol=1e-6)
    assert told[:2] == [[], []] and ["supervised_logits_only" in text for text in told[2]] == [True]


def test_the_source_of_every_family_that_is_tested_takes_the_loss_as_expected() -> None:
    for name in CONFIGS:
        assert "self.loss_function(" in inspect.getsource(inspect.unwrap(type(made(name)).forward)), name
