"""A loop of one's own, told of steps by the optimizer's hooks: equal to calling the handle by hand."""

import pytest
import torch
from families import batch_of, made

from sparsight.errors import UserError
from sparsight.integrations.loop import follow
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach

NAME = "llava, clip + llama"
STEPS = 4
METHODS = CompressorConfig(keep=0.25, final=1.0), SkipperConfig(alpha=0.5, epsilon=0.0)


def trained(hooks: bool, start: int = 0, model=None, steps=STEPS):
    """Losses, the keep of each step, and the model."""
    model = made(NAME) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    handle, losses, keeps = attach(model, *METHODS), [], []
    if hooks:
        follow(handle, [optimizer], STEPS, start=start)
    for step in range(start, steps):
        if not hooks:
            handle.step(step, step / STEPS)
        loss = model(**batch_of(NAME, model, seed=step)).loss
        loss.backward()
        losses.append(loss.item())
        keeps.append((handle.keep, handle.skipped))
        if not hooks:
            handle.clear_gradients()
        optimizer.step()
        optimizer.zero_grad()
    return losses, keeps, model


def test_hooks_of_the_optimizer_do_as_steps_by_hand():
    losses, keeps, model = trained(hooks=True)
    expected, expected_keeps, reference = trained(hooks=False)
    assert (losses, keeps) == (expected, expected_keeps)
    assert len({keep for keep, _ in keeps}) == STEPS and any(any(skipped) for _, skipped in keeps)
    for (name, found), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(found, wanted), name


def test_a_resumed_run_goes_on_in_its_step():
    assert trained(hooks=True, start=2)[1] == trained(hooks=False)[1][2:]


def test_gradients_of_skipped_layers_are_cleared_before_each_of_several_optimizers():
    model = made(NAME)
    halves = list(model.parameters())[::2], list(model.parameters())[1::2]
    optimizers = [torch.optim.SGD(half, lr=0.1) for half in halves]
    handle = attach(model, skipper=SkipperConfig(alpha=1.0, epsilon=0.0, schedule="constant", protected=(1, 0)))
    follow(handle, optimizers, STEPS)
    layer = handle.layers[handle.skipped.index(True)]
    before = [p.detach().clone() for p in layer.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # as on several ranks, but not of zeros
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))
    assert handle.global_step == 1


@pytest.mark.parametrize(
    "optimizers, steps, message", [([object()], 4, "object has no register_step"), ([], 0, "steps 0")]
)
def test_what_cannot_be_followed_is_refused(optimizers, steps, message):
    with pytest.raises(UserError, match=message):
        follow(attach(made(NAME), METHODS[0]), optimizers, steps)
