import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsight.bridges import build_bridge
from sparsight.bridges.patchwise import pixel_shuffle
from sparsight.settings.bridges import LinearConfig, MlpConfig, PixelShuffleConfig


def maps(height, width, widths=(6, 10), batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, height, width, channels, generator=generator) for channels in widths]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_pixel_shuffle_keeps_every_value_in_its_place(height, width, factor):
    x = torch.arange(1.0, height * width * 2 + 1).reshape(1, height, width, 2)
    y = pixel_shuffle(x, factor)
    rows, columns = -(-height // factor), -(-width // factor)
    assert y.shape == (1, rows, columns, 2 * factor**2)
    folded = y.unflatten(3, (factor, factor, 2))
    for row in range(rows * factor):
        for column in range(columns * factor):
            found = folded[0, row // factor, column // factor, row % factor, column % factor]
            inside = row < height and column < width
            assert torch.equal(found, x[0, row, column] if inside else torch.zeros(2))


@pytest.mark.parametrize(
    "settings",
    [LinearConfig(), MlpConfig(), PixelShuffleConfig(), PixelShuffleConfig(factor=3), PixelShuffleConfig(factor=1)],
)
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)], ids=str)
def test_as_many_tokens_as_the_settings_say(settings, size):
    bridge = build_bridge(settings, (6, 10), 12)
    assert bridge(maps(*size)).shape == (2, settings.visual_tokens(size), 12)


@pytest.mark.parametrize("settings", [LinearConfig(), MlpConfig()])
def test_a_token_is_its_patch(settings):
    """Levels are joined along the channels; token number = row x width + column."""
    bridge, levels = build_bridge(settings, (6, 10), 12), maps(4, 5)
    whole = bridge(levels)
    for row, column in [(0, 0), (1, 3), (3, 4)]:
        joined = torch.cat([level[:, row, column] for level in levels], -1)
        error = (whole[:, row * 5 + column] - bridge.proj(bridge.norm(joined))).abs().max()
        assert error <= 1e-6, error  # measured 2e-7


def test_pixel_shuffle_tokens_see_their_square():
    bridge = build_bridge(PixelShuffleConfig(factor=2), (6, 10), 12)
    levels = [level.requires_grad_() for level in maps(5, 4, batch=1)]
    token = bridge(levels)[0, 3]  # second row, second column
    grad = torch.autograd.grad(token.square().sum(), levels)[0][0].abs().amax(-1)
    assert grad.nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]


@pytest.mark.parametrize("kind", ["linear", "mlp", "pixel_shuffle"])
def test_features_of_the_wrong_shape(kind):
    bridge = build_bridge(kind, (6, 10), 12)
    with pytest.raises(
        ValueError, match=r"expects 2 levels \(B, H, W, C\) with C = \[6, 10\], found \[\(2, 4, 4, 6\)\]"
    ):
        bridge(maps(4, 4)[:1])
    with pytest.raises(ValueError, match="same batch, height and width"):
        bridge([maps(4, 4)[0], maps(4, 5)[1]])


def test_parameter_counts():
    def count(kind):
        with torch.device("meta"):
            return sum(p.numel() for p in build_bridge(kind, [1024, 1024], 4096).parameters())

    assert count("linear") == 2 * 2048 + 2048 * 4096 + 4096
    assert count("mlp") == count("linear") + 4096 * 4096 + 4096
    assert count("pixel_shuffle") == 2 * 8192 + 8192 * 4096 + 4096 + 4096 * 4096 + 4096
