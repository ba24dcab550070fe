"""The feed-forward part against the two layers and the activation that it stands for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crm.model.feed_forward import ROWS, feed_forward

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def layers(dtype=torch.float64) -> tuple[torch.Tensor, nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return torch.randn(2, ROWS // 2 + 3, 6, dtype=dtype, requires_grad=True), *(
        nn.Linear(*sizes).to(dtype) for sizes in ((6, 10), (10, 6))
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_are_those_of_the_layers(activation):
    x, wide, narrow = layers()
    ours, theirs = feed_forward(x, wide, narrow, activation), narrow(ACTIVATIONS[activation](wide(x)))
    torch.testing.assert_close(ours, theirs)
    grad, given = torch.randn_like(ours), [x, *wide.parameters(), *narrow.parameters()]
    for one, two in zip(torch.autograd.grad(ours, given, grad), torch.autograd.grad(theirs, given, grad), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_is_as_close_as_that_of_the_layers(activation):
    x, wide, narrow = layers(torch.float32)
    exact = narrow(ACTIVATIONS[activation](wide(x)))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = feed_forward(x, wide, narrow, activation), narrow(ACTIVATIONS[activation](wide(x)))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()
    given = [x, *wide.parameters(), *narrow.parameters()]
    for name, one, two, three in zip(
        ("x", "wide", "wide bias", "narrow", "narrow bias"),
        *(torch.autograd.grad(found.float().square().sum(), given) for found in (ours, theirs, exact)),
        strict=True,
    ):
        assert one.dtype == torch.float32
        assert (one - three).norm() <= 1.5 * (two - three).norm() + 1e-3 * three.norm(), name


def test_hidden_values_are_kept_once():
    kept = []
    x, wide, narrow = layers()
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        feed_forward(x, wide, narrow, "relu")
    weights = sum(y.numel() for y in (wide.weight, wide.bias, narrow.weight))
    assert sum(y.numel() for y in kept) == x.numel() + weights + x.shape[0] * x.shape[1] * 10
