import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparsight.schedules import kept_tokens
from sparsight.sparse.compress import METHODS, compress, redundancy


def made(batch=2, tokens=24, width=6, seed=0):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def options(method, batch=2, width=6):
    if method == "text":
        return {"text_BTD": made(batch, 5, width, seed=1)}
    return {"generators": generators(3, batch)} if method == "random" else {}


def generators(seed, batch=2):
    return [torch.Generator().manual_seed(seed + image) for image in range(batch)]


@settings(max_examples=60)
@given(st.sampled_from(list(METHODS)), st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 1), st.booleans())
def test_as_many_as_were_asked_for_in_their_order(method, rows, columns, keep, with_grid):
    x = made(tokens=rows * columns)
    grid = {"grid": (rows, columns)} if with_grid else {}
    kept, index = compress(x, keep, method, **options(method), **grid)
    count = kept_tokens(rows * columns, keep)
    assert kept.shape == (2, count, 6) and index.shape == (2, count)
    assert (index.diff(dim=1) > 0).all() and index.min() >= 0 and index.max() < rows * columns
    if method not in ("pool", "merge"):
        assert torch.equal(kept, x.gather(1, index[..., None].expand(-1, -1, 6)))


@pytest.mark.parametrize("method", METHODS)
def test_keep_all_is_the_same_tensor(method):
    x = made()
    kept, index = compress(x, 1.0, method, **options(method))
    assert kept is x and torch.equal(index, torch.arange(24).expand(2, -1))


@pytest.mark.parametrize("method", METHODS)
def test_images_of_a_batch_do_not_meet_and_gradients_flow(method):
    x = made().requires_grad_()
    kept, index = compress(x, 0.25, method, **options(method))
    first = {key: value[:1] for key, value in options(method).items()}
    alone, where = compress(x[:1], 0.25, method, **first)
    assert torch.equal(index[:1], where) and torch.allclose(kept[:1], alone, atol=1e-6)
    kept.sum().backward()
    touched = (x.grad.abs().sum(-1) > 0).sum(1)
    assert (touched == (24 if method in ("pool", "merge") else 6)).all()  # made of all tokens, or of those kept


def test_uniform_is_evenly_spread():
    assert compress(made(), 0.25)[1][0].tolist() == [2, 6, 10, 14, 18, 22]


def test_random_is_a_function_of_its_generators():
    def drawn(seed):
        return compress(made(), 0.5, "random", generators=generators(seed))[1]

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    assert not torch.equal(*drawn(1))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn(5)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not touched


def test_text_keeps_what_the_text_speaks_of():
    x = torch.eye(8)[None]
    text = torch.stack([x[0, 5], x[0, 2], x[0, 7]])[None]
    assert compress(x, 0.25, "text", text_BTD=text[:, :2])[1].tolist() == [[2, 5]]
    masked = torch.tensor([[False, True, True]])
    assert compress(x, 0.25, "text", text_BTD=text, text_mask_BT=masked)[1].tolist() == [[2, 7]]
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert compress(x, 0.25, "text", text_BTD=text, text_mask_BT=nothing)[1].tolist() == [[0, 1]]


def test_pool_is_the_mean_of_squares():
    x = made(tokens=16)
    kept, index = compress(x, 0.25, "pool", grid=(4, 4))
    wanted = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (4, 4)), 2).flatten(2).transpose(1, 2)
    assert (kept - wanted).abs().max() <= 1e-6
    assert [divmod(place, 4)[0] // 2 * 2 + place % 4 // 2 for place in index[0].tolist()] == [0, 1, 2, 3]


@given(st.integers(1, 7), st.integers(1, 7), st.floats(0.02, 0.99))
def test_pool_uses_every_token_once(rows, columns, keep):
    """The sum over cells of mean x size is the sum of all tokens: cells cover the grid without overlap."""
    tokens = rows * columns
    kept, _ = compress(torch.eye(tokens)[None], keep, "pool", grid=(rows, columns))
    members = kept[0] > 0
    assert (members.sum(0) == 1).all() and (members.sum(1) >= 1).all()
    assert torch.allclose(kept[0].sum(1), torch.ones(len(kept[0])))


def test_similarity_drops_what_its_neighbours_say():
    x = torch.zeros(1, 5, 5, 2)
    x[..., 0] = 1.0
    x[0, 2, 2] = torch.tensor([0.0, 1.0])
    _, index = compress(x.flatten(1, 2), 1 / 25, "similarity", grid=(5, 5))
    assert index.tolist() == [[12]]  # the odd one out
    found = redundancy(x.flatten(1, 2), (5, 5)).view(5, 5)
    assert (
        found[2, 2] == 0
        and found[0, 0] == 1
        and found[1, 2] == pytest.approx(0.75)
        and found[2, 1] == pytest.approx(0.75)
    )


def test_merge_joins_equal_tokens_and_keeps_their_mean():
    a, b, c = torch.eye(3)
    x = torch.stack([a, a, b, b, c, c])[None]
    kept, index = compress(x, 0.5, "merge")
    assert index.tolist() == [[0, 2, 4]] and torch.allclose(kept[0], torch.eye(3))


@given(st.integers(2, 30), st.floats(0.02, 0.99))
def test_merge_loses_nothing(tokens, keep):
    """Each kept token is a mean of its own group; groups cover all tokens."""
    x = torch.eye(tokens)[None]
    kept, _ = compress(x, keep, "merge")
    groups = kept[0] > 1e-6
    assert (groups.sum(0) == 1).all()
    assert torch.allclose(kept[0], groups / groups.sum(1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"keep": 0.0}, "keep 0.0: expected a share above 0 and up to 1"),
        ({"keep": 1.5}, "keep 1.5"),
        ({"method": "text"}, "method 'text' needs the text's embeddings"),
    ],
)
def test_what_is_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        compress(made(), **({"keep": 0.5} | arguments))
