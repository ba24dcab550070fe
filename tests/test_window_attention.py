"""Attention in windows image by image against the same all at once with PyTorch's own backward pass."""

import pytest
import torch

from crm.model import window_attention as module
from crm.model.window_attention import Windows, _attend, window_attention

HEADS, SIDE = 2, 4


def given(dtype=torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((3, 6, 9, 3 * 8), (3 * 8,), (HEADS, SIDE**2, SIDE**2))  # neither side is a multiple of the window's
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("tokens", [1, 2 * 54, 2**13])  # one image at a time, two, all
@pytest.mark.parametrize("shift", [0, 2])
def test_values_and_gradients_are_those_of_all_images_at_once(monkeypatch, shift, tokens):
    monkeypatch.setattr(module, "TOKENS", tokens)
    inputs, windows = given(), Windows(SIDE, shift)
    ours, theirs = window_attention(*inputs, windows), _attend(*inputs, windows)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for one, two in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_autocast_is_the_same_in_both_directions():
    inputs, windows = given(torch.float32), Windows(SIDE, 2)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = window_attention(*inputs, windows), _attend(*inputs, windows)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
    grad = torch.randn_like(ours)
    for one, two in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)


def test_what_is_between_projection_and_result_is_not_kept():
    inputs, kept = given(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        window_attention(*inputs, Windows(SIDE, 2))
    assert sum(tensor.numel() for tensor in kept) == sum(tensor.numel() for tensor in inputs)
