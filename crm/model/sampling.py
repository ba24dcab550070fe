"""Deformable sampling: bilinear samples of maps of several levels, weighted and summed, as one weighted gather.

A sample is four rows of a table of all cells, so the sum over a head's samples is an embedding bag with a weight per
row. Nothing as large as the samples themselves is ever made, forward or backward, and the backward pass keeps the
inputs alone. On CUDA the kernels of `crm.model.sampling_kernel` do the same where they are faster, which is measured at
the first call with maps of these sizes.

b = batch, s = tokens of the levels together (t with a border around every level), m = heads, l = levels, p = samples
of a head on a level, d = channels of a head
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]  # height and width in cells


class Grid(NamedTuple):
    """Where the cells of all levels lie; a level's table has a border of one cell, which is zero.

    Constants stand once per sample: operations on equal shapes take half the time of those that spread four values.
    """

    x: Float[Tensor, "s m l p"]  # centre of every token, in cells of the level that is sampled
    y: Float[Tensor, "s m l p"]
    width: Float[Tensor, "s m l p"]  # of the level
    height: Float[Tensor, "s m l p"]
    row: Float[Tensor, "s m l p"]  # of the level's first cell within the border, for this head
    down: Int[Tensor, "s m l p"]  # from a cell's row in the table to that of the cell below
    tokens: int  # in the table


@lru_cache(maxsize=64)
def grid_of(sizes: tuple[Size, ...], heads: int, points: int, device: torch.device, dtype: torch.dtype) -> Grid:
    """The grid of these levels; token centres of each are at the same relative place in all others."""
    with torch.inference_mode(False):
        limit = torch.tensor([[width, height] for height, width in sizes], device=device, dtype=dtype)
        relative = []
        for height, width in sizes:
            y, x = ((torch.arange(side, device=device, dtype=dtype) + 0.5) / side for side in (height, width))
            relative.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=2).flatten(0, 1))
        x, y = (torch.cat(relative)[:, None] * limit - 0.5).unbind(2)
        tokens = [(height + 2) * (width + 2) for height, width in sizes]
        start = torch.tensor([0, *tokens[:-1]], device=device).cumsum(0).to(dtype)
        shape = (len(x), heads, len(sizes), points)
        down = (limit[:, :1] + 2) * heads
        first = start[:, None] * heads + down + heads + torch.arange(heads, device=device, dtype=dtype)[:, None, None]
        parts = (x[:, None, :, None], y[:, None, :, None], limit[:, :1], limit[:, 1:], first, down.int())
        return Grid(*(part.expand(shape).contiguous() for part in parts), sum(tokens))


class _Samples(NamedTuple):
    """Of every sample the table's row of its upper left cell, how far it is from there, and what stands around it."""

    first: Int[Tensor, "b s m l p"]
    x: Float[Tensor, "b s m l p"]
    y: Float[Tensor, "b s m l p"]
    inside: tuple[Tensor, Tensor]  # b s m l p, of x and y: not beyond the border, where the place changes nothing
    down: Int[Tensor, "s m l p"]

    def corners(self) -> Iterator[Int[Tensor, "b s m l p"]]:
        """The table's rows of upper left, upper right, lower left, lower right."""
        heads = self.first.shape[2]
        below = self.first + self.down
        yield from (self.first, self.first + heads, below, below + heads)


def _samples(offsets: Float[Tensor, "b s m l p 2"], grid: Grid) -> _Samples:
    b, _, heads = offsets.shape[:3]
    found = []
    for moved, last in ((offsets[..., 0] + grid.x, grid.width), (offsets[..., 1] + grid.y, grid.height)):
        place = moved.clamp_min(-1).minimum(last)
        corner = place.floor().minimum(last - 1)
        found.append((corner, place.sub(corner), moved == place))
    (left, x, inside_x), (top, y, inside_y) = found
    row = torch.add(grid.row, left, alpha=heads).addcmul_(top, grid.down.to(top.dtype)).int()  # exact below 2^24 rows
    row.clamp_(min=0)  # of nan, which is to reach the loss and be told there
    if b > 1:
        row += torch.arange(b, device=row.device, dtype=torch.int32)[:, None, None, None, None] * (grid.tokens * heads)
    return _Samples(row, x, y, (inside_x, inside_y), grid.down)


def _corner_weights(samples: _Samples) -> list[Tensor]:
    """Bilinear shares of the four corners: upper left, upper right, lower left, lower right."""
    right = samples.x * samples.y
    return [1 - samples.x - samples.y + right, samples.x - right, samples.y - right, right]


def _table(value: Float[Tensor, "b s m d"], sizes: Sequence[Size], grid: Grid) -> Float[Tensor, "r d"]:
    """All cells of all levels with their borders, a row per cell and head."""
    b, _, heads, channels = value.shape
    table = value.new_zeros(b, grid.tokens, heads, channels)
    for inside, level in zip(_inside(table, sizes), _levels(value, sizes), strict=True):
        inside.copy_(level)
    return table.view(-1, channels)


def _levels(x: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    parts = x.split([height * width for height, width in sizes], dim=1)
    return [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]


def _inside(table: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """The levels in a table (b t m d), without their borders."""
    padded = [(height + 2, width + 2) for height, width in sizes]
    return [level[:, 1:-1, 1:-1] for level in _levels(table, padded)]


class _WeightedGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, offsets: Tensor, weights: Tensor, sizes: tuple[Size, ...]) -> Tensor:
        ctx.save_for_backward(value, offsets, weights)
        ctx.sizes = sizes
        return _whole([_forward(*part, sizes) for part in _parts(value, offsets, weights)])

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        found = [_backward(*part, ctx.sizes) for part in _parts(*ctx.saved_tensors, grad_outputs[0])]
        of_value, of_offsets, of_weights = (_whole(parts) for parts in zip(*found, strict=True))
        return of_value, of_offsets, of_weights, None


def _whole(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Image by image on a CPU, where what belongs to one fits into the cache; else all together."""
    size = 1 if tensors[0].device.type == "cpu" else len(tensors[0])
    yield from zip(*(one.split(size) for one in tensors), strict=True)


def _forward(value: Tensor, offsets: Tensor, weights: Tensor, sizes: tuple[Size, ...]) -> Tensor:
    grid = grid_of(sizes, value.shape[2], weights.shape[4], value.device, value.dtype)
    samples, table = _samples(offsets, grid), _table(value, sizes, grid)
    total = None
    for rows, share in zip(samples.corners(), _corner_weights(samples), strict=True):
        bag = _bag(table, rows, weights * share)
        total = bag if total is None else total.add_(bag)
    assert total is not None
    return total.view_as(value)


def _backward(
    value: Tensor, offsets: Tensor, weights: Tensor, grad: Tensor, sizes: tuple[Size, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offsets and weights."""
    grid = grid_of(sizes, value.shape[2], weights.shape[4], value.device, value.dtype)
    samples, table = _samples(offsets, grid), _table(value, sizes, grid)
    grad = grad.reshape(-1, value.shape[3])
    shares = _corner_weights(samples)
    found = [_products(table, rows, grad).view_as(weights) for rows in samples.corners()]
    above, below = (torch.lerp(left, right, samples.x) for left, right in (found[:2], found[2:]))
    of_weights, down = torch.lerp(above, below, samples.y), below - above
    right = torch.lerp(found[1] - found[0], found[3] - found[2], samples.y)
    of_offsets = torch.stack(
        [one.mul_(weights).mul_(inside) for one, inside in zip((right, down), samples.inside, strict=True)], dim=-1
    )
    return _scattered(grad, samples, weights, shares, value.shape, sizes, grid), of_offsets, of_weights


def _bag(table: Tensor, rows: Tensor, weights: Tensor) -> Float[Tensor, "n d"]:
    """For every (b s m) the weighted sum of the table's rows."""
    return F.embedding_bag(rows.flatten(0, 2).flatten(1), table, mode="sum",
                           per_sample_weights=weights.flatten(0, 2).flatten(1))  # fmt: skip


def _products(table: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
    """Inner products of every (b s m)'s gradient with each of its rows: the gradient of the bag's weights.

    The bags' own backward pass, on a CPU, calls a matrix library once for every 32 numbers: it takes three times as
    long as the product that is wanted at some places only, which is the same.
    """
    each = rows[0, 0, 0].numel()
    begins = torch.arange(0, rows.numel() + 1, each, device=rows.device, dtype=rows.dtype)
    if rows.device.type == "cpu":
        found = _sparse(begins, rows.flatten(), table.new_zeros(rows.numel()), (len(grad), len(table)))
        return torch.sparse.sampled_addmm(found, grad, table.T, out=found).values()
    bags = torch.arange(len(grad), device=rows.device, dtype=rows.dtype).repeat_interleave(each)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, table, rows.flatten(), begins[:-1], bags, 0)


def _sparse(begins: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """A matrix by rows; one column may come several times in a row."""
    return torch.sparse_csr_tensor(begins, columns, values, size=size, check_invariants=False)


with warnings.catch_warnings():  # the first such matrix of a process warns that this layout may still change
    warnings.simplefilter("ignore")
    _sparse(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([0.0]), (1, 1))


def _scattered(
    grad: Float[Tensor, "n d"],
    samples: _Samples,
    weights: Tensor,
    shares: Sequence[Tensor],
    shape: torch.Size,
    sizes: tuple[Size, ...],
    grid: Grid,
) -> Float[Tensor, "b s m d"]:
    """The gradient of the values: bags again, of what falls on each row.

    Sorted once by the upper left row; what falls on the other corners lies one cell further right, or down, or both.
    """
    b, _, heads, channels = shape
    order, begins = _by_row(samples.first.flatten(), b * grid.tokens * heads)
    bag = order.div(len(order) // len(grad), rounding_mode="floor").int()
    total = grad.new_zeros(shape)
    levels = _levels(total, sizes)
    for corner, share in enumerate(shares):
        own = (weights * share).flatten().index_select(0, order)
        fell = F.embedding_bag(bag, grad, begins, mode="sum", per_sample_weights=own)
        down, right = divmod(corner, 2)
        padded = _levels(fell.view(b, grid.tokens, heads, channels), [(h + 2, w + 2) for h, w in sizes])
        for level, (height, width), found in zip(levels, sizes, padded, strict=True):
            level += found[:, 1 - down : 1 - down + height, 1 - right : 1 - right + width]
    return total


def _by_row(rows: Int[Tensor, " n"], count: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " count"]]:
    """The order in which samples of the same row follow one another, and where those of each row begin."""
    if rows.device.type == "cpu":  # counted, not sorted: rows are few
        number = np.arange(len(rows), dtype=np.int32)
        counted = coo_array((np.ones(len(rows), np.bool_), (rows.numpy(), number)), shape=(count, len(rows))).tocsr()
        return torch.from_numpy(counted.indices), torch.from_numpy(counted.indptr)[:-1]
    ascending, order = rows.sort(stable=True)
    every = torch.arange(count, device=rows.device, dtype=rows.dtype)
    return order, torch.searchsorted(ascending, every, out_int32=True)


_gathered = torch.compiler.disable(_WeightedGather.apply)  # a backward pass of this kind is not traced


def deformable_sample(
    value: Float[Tensor, "b s m d"],
    offsets: Float[Tensor, "b s m l p 2"],
    weights: Float[Tensor, "b s m l p"],
    sizes: tuple[Size, ...],
) -> Float[Tensor, "b s m d"]:
    """Each head's weighted sum of bilinear samples around each token, on every level; zero beyond the borders.

    Args:
        offsets: (x, y) from the token's centre, in cells of the level that is sampled.
    """
    compute = _kernel_of(value, offsets, weights, sizes) or _gathered
    found = compute(value, offsets, weights, sizes)
    assert isinstance(found, Tensor)
    return found


@torch.compiler.disable
def _kernel_of(value: Tensor, offsets: Tensor, weights: Tensor, sizes: tuple[Size, ...]) -> Callable[..., Any] | None:
    """The Triton kernel where it is to be used: on CUDA, in float32, where no bit need be the same at the next time."""
    if value.device.type != "cuda" or value.dtype != torch.float32 or torch.are_deterministic_algorithms_enabled():
        return None
    return _faster_kernel(value.device, tuple(value.shape[1:]), weights.shape[4], sizes)


@lru_cache(maxsize=64)
def _faster_kernel(
    device: torch.device, shape: tuple[int, int, int], points: int, sizes: tuple[Size, ...]
) -> Callable[..., Any] | None:
    """The kernel if it takes less time than the gather on this device for two images of these sizes."""
    try:
        from crm.model.sampling_kernel import KernelSamples  # noqa: PLC0415 - a GPU's builds of PyTorch alone have it

        kernel, gather = seconds_of_both(device, shape, points, sizes)
    except ImportError:
        return None
    except Exception as error:
        warnings.warn(f"deformable sampling without its kernel: {error}", stacklevel=2)
        return None
    return torch.compiler.disable(KernelSamples.apply) if kernel < gather else None


def seconds_of_both(
    device: torch.device, shape: tuple[int, int, int], points: int, sizes: tuple[Size, ...]
) -> tuple[float, float]:
    """Of forward and backward pass for two images, by the kernel and by the gather.

    Args:
        shape: tokens, heads and channels of a head.
    """
    from crm.model.sampling_kernel import KernelSamples  # noqa: PLC0415

    tokens, heads, _ = shape
    as_it_is = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)  # a checkpoint around has its own
    with torch.inference_mode(False), torch.enable_grad(), as_it_is:
        draw = torch.Generator(device).manual_seed(0)
        samples = (2, tokens, heads, len(sizes), points)
        given = [
            torch.randn(size, device=device, generator=draw, requires_grad=True)
            for size in ((2, *shape), (*samples, 2), samples)
        ]
        return _seconds(KernelSamples.apply, given, sizes), _seconds(_gathered, given, sizes)


def _seconds(compute: Callable[..., Any], given: Sequence[Tensor], sizes: tuple[Size, ...]) -> float:
    """Of forward and backward pass, the best of three after one that compiles."""
    found = []
    for _ in range(4):
        torch.cuda.synchronize(given[0].device)
        began = time.perf_counter()
        torch.autograd.grad(compute(*given, sizes).sum(), given)
        torch.cuda.synchronize(given[0].device)
        found.append(time.perf_counter() - began)
    return min(found[1:])
