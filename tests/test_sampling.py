"""Deformable sampling against grid_sample, and its own backward pass against finite differences."""

import pytest
import torch
from torch.nn import functional as F

from crm.model.sampling import _by_row, deformable_sample

SIZES = ((2, 3), (4, 5), (7, 4))


def inputs(spread: float, sizes=SIZES) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value, offsets and weights in float64; a large spread sends most samples beyond the borders."""
    torch.manual_seed(0)
    tokens = sum(height * width for height, width in sizes)
    value = torch.randn(2, tokens, 2, 3, dtype=torch.float64, requires_grad=True)
    offsets = (torch.randn(2, tokens, 2, 3, 4, 2, dtype=torch.float64) * spread).requires_grad_()
    weights = torch.rand(2, tokens, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    return value, offsets, weights


def by_grid_sample(value, offsets, weights, sizes=SIZES):
    """The released fall-back: all samples, stacked, then weighted and summed."""
    b, _, heads, channels = value.shape
    rows = []
    for height, width in sizes:
        y, x = torch.meshgrid(*((torch.arange(side).double() + 0.5) / side for side in (height, width)), indexing="ij")
        rows.append(torch.stack([x, y], dim=2).flatten(0, 1))
    centre, samples = torch.cat(rows)[:, None, None], []
    for level, (part, (height, width)) in enumerate(zip(value.split([h * w for h, w in sizes], 1), sizes, strict=True)):
        place = centre + offsets[:, :, :, level] / torch.tensor([width, height])
        maps = part.permute(0, 2, 3, 1).reshape(b * heads, channels, height, width)
        samples.append(F.grid_sample(maps, 2 * place.transpose(1, 2).flatten(0, 1) - 1, align_corners=False))
    found = torch.stack(samples, dim=3) * weights.transpose(1, 2).flatten(0, 1)[:, None]
    return found.sum((3, 4)).view(b, heads, channels, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_sampling_and_its_gradients_equal_grid_sample(spread):
    given = inputs(spread)
    ours, theirs = deformable_sample(*given, SIZES), by_grid_sample(*given)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for one, two in zip(torch.autograd.grad(ours, given, grad), torch.autograd.grad(theirs, given, grad), strict=True):
        torch.testing.assert_close(one, two)


def test_the_backward_pass_agrees_with_finite_differences():
    sizes = ((1, 1), (1, 2), (2, 1))
    assert torch.autograd.gradcheck(lambda x, y, z: deformable_sample(x, y, z, sizes), inputs(1.0, sizes))


def test_samples_are_counted_in_the_order_in_which_they_would_be_sorted():
    rows = torch.randint(0, 9, (50,), dtype=torch.int32)
    order, begins = _by_row(rows, 12)  # the last rows have none
    ascending, expected = rows.sort(stable=True)
    assert torch.equal(order.long(), expected)
    assert torch.equal(begins.long(), torch.searchsorted(ascending, torch.arange(12, dtype=torch.int32)))


def test_nothing_is_kept_for_the_backward_pass_but_the_inputs():
    kept = []
    given = inputs(1.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        deformable_sample(*given, SIZES)
    assert sum(x.numel() for x in kept) == sum(x.numel() for x in given)
