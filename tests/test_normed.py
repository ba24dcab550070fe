"""Layer norm with what follows it, against the layers that they stand for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crm.model.feed_forward import NARROW, ROWS, feed_forward
from crm.model.normed import normed_linear

CHANNELS = 8
WIDE = NARROW * 8 + 8  # of float64


def layers(dtype=torch.float64, channels: int = CHANNELS) -> tuple[torch.Tensor, nn.LayerNorm, nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    norm, wide, narrow = nn.LayerNorm(channels), nn.Linear(channels, 12), nn.Linear(12, channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, ROWS // 2 + 3, channels, dtype=dtype, requires_grad=True)
    return x, *(layer.to(dtype) for layer in (norm, wide, narrow))


def linear(x, norm, wide, narrow):
    return normed_linear(x, norm, wide.weight), F.linear(norm(x), wide.weight), [*norm.parameters(), wide.weight]


def forward(activation):
    def both(x, norm, wide, narrow):
        act = {"relu": F.relu, "gelu": F.gelu}[activation]
        parameters = [*norm.parameters(), *wide.parameters(), *narrow.parameters()]
        return feed_forward(x, wide, narrow, activation, norm), narrow(act(wide(norm(x)))), parameters

    return both


BOTH = {"linear": linear, "relu": forward("relu"), "gelu": forward("gelu")}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("channels", [CHANNELS, WIDE])
def test_values_and_gradients_are_those_of_the_layers(name, channels):
    x, *given = layers(channels=channels)
    ours, theirs, parameters = BOTH[name](x, *given)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for one, two in zip(*(torch.autograd.grad(found, [x, *parameters], grad) for found in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("half_input", [False, True])
def test_autocast_is_as_close_as_that_of_the_layers(name, half_input):
    x, *given = layers(torch.float32)
    exact, _, parameters = BOTH[name](x, *given)
    seen = x.bfloat16() if half_input else x
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs, _ = BOTH[name](seen, *given)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()
    for one, two, three in zip(
        *(torch.autograd.grad(found.float().square().sum(), [x, *parameters]) for found in (ours, theirs, exact)),
        strict=True,
    ):
        assert one.dtype == torch.float32
        assert (one - three).norm() <= 1.5 * (two - three).norm() + 1e-3 * three.norm()


@pytest.mark.parametrize(("name", "channels", "hidden"), [
    ("linear", CHANNELS, 0), ("relu", CHANNELS, 12), ("gelu", CHANNELS, 0), ("gelu", WIDE, 12),
])  # fmt: skip
def test_neither_normalised_nor_narrow_hidden_values_are_kept(name, channels, hidden):
    x, norm, wide, narrow = layers(channels=channels)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        normed_linear(x, norm, wide.weight) if name == "linear" else feed_forward(x, wide, narrow, name, norm)
    rows = x.shape[0] * x.shape[1]
    assert sum(y.numel() for y in kept if len(y) in (rows, ROWS, rows - ROWS)) == rows * (channels + hidden)


def test_without_rows_there_is_nothing():
    _, norm, wide, narrow = layers()
    x = torch.zeros(0, 3, CHANNELS, dtype=torch.float64, requires_grad=True)
    for found in (normed_linear(x, norm, wide.weight), feed_forward(x, wide, narrow, "gelu", norm)):
        assert len(found) == 0
        found.sum().backward()
    assert wide.weight.grad.abs().max() == 0
