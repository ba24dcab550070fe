"""Deformable sampling for a GPU: one Triton kernel forward and one backward, in place of `crm.model.sampling`'s gather.

A program has ROWS rows, each a head of a token of an image, and walks over their samples; nothing but inputs and
results is ever in memory. The gradients of values are added up by atomic operations, whose order differs from run to
run. So the kernels are not used where PyTorch is told to be deterministic.

b = batch, s = tokens of the levels together, m = heads, l = levels, p = samples of a head on a level, d = channels of a
head
"""

from functools import lru_cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from crm.model.sampling import Size, grid_of

ROWS = 16
# `no_type_check`: Triton reads the function itself, whatever else checks annotations must not wrap it


@triton.jit
@no_type_check
def _axis(moved, last):
    """Of a coordinate the lower cell, how far beyond it lies, and whether it is not beyond the border."""
    place = tl.minimum(tl.maximum(moved, -1.0), last.to(tl.float32))
    lower = tl.minimum(tl.floor(place), last.to(tl.float32) - 1)
    return lower.to(tl.int32), place - lower, moved == place


@triton.jit
@no_type_check
def _level(levels, level):
    """First token, height and width of a level."""
    return tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1), tl.load(levels + 3 * level + 2)


@triton.jit
@no_type_check
def _sample(offsets, weights, centre_x, centre_y, sample, constant, live):
    """Where a sample is, x and y in cells of its level, and its weight."""
    moved_x = tl.load(offsets + 2 * sample, live, 0.0) + tl.load(centre_x + constant, live, 0.0)
    moved_y = tl.load(offsets + 2 * sample + 1, live, 0.0) + tl.load(centre_y + constant, live, 0.0)
    return moved_x, moved_y, tl.load(weights + sample, live, 0.0)


@triton.jit
@no_type_check
def _cells(value, image, head, x, y, start, width, height, channel, live, tokens, heads, channels):
    """Where the channels of a cell stand, and which of them are there."""
    there = live & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    row = ((image * tokens + start + y * width + x) * heads + head) * channels
    return value + row[:, None] + channel[None, :], there[:, None] & (channel < channels)[None, :]


@triton.jit
@no_type_check
def _forward(
    value, offsets, weights, centre_x, centre_y, levels, found, rows, tokens, heads, channels,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    head, image, place = row % heads, row // (heads * tokens), row % (heads * tokens)
    channel = tl.arange(0, WIDE)
    total = tl.zeros((ROWS, WIDE), tl.float32)
    for level in range(LEVELS):
        start, height, width = _level(levels, level)
        for point in range(POINTS):
            number = level * POINTS + point
            sample, constant = row * (LEVELS * POINTS) + number, place * (LEVELS * POINTS) + number
            moved_x, moved_y, weight = _sample(offsets, weights, centre_x, centre_y, sample, constant, live)
            left, x, _ = _axis(moved_x, width)
            top, y, _ = _axis(moved_y, height)
            for corner in tl.static_range(4):  # pyright: ignore - compiled, never iterated
                right, down = corner % 2, corner // 2
                share = (x if right else 1 - x) * (y if down else 1 - y)
                cells, there = _cells(value, image, head, left + right, top + down, start, width, height, channel,
                                      live, tokens, heads, channels)  # fmt: skip
                total += tl.load(cells, there, 0.0) * (weight * share)[:, None]
    out = found + row[:, None] * channels + channel[None, :]
    tl.store(out, total, live[:, None] & (channel < channels)[None, :])


@triton.jit
@no_type_check
def _backward(
    value, offsets, weights, centre_x, centre_y, levels, grad, of_value, of_offsets, of_weights,
    rows, tokens, heads, channels,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    head, image, place = row % heads, row // (heads * tokens), row % (heads * tokens)
    channel = tl.arange(0, WIDE)
    ours = live[:, None] & (channel < channels)[None, :]
    fell = tl.load(grad + row[:, None] * channels + channel[None, :], ours, 0.0)
    for level in range(LEVELS):
        start, height, width = _level(levels, level)
        for point in range(POINTS):
            number = level * POINTS + point
            sample, constant = row * (LEVELS * POINTS) + number, place * (LEVELS * POINTS) + number
            moved_x, moved_y, weight = _sample(offsets, weights, centre_x, centre_y, sample, constant, live)
            left, x, inside_x = _axis(moved_x, width)
            top, y, inside_y = _axis(moved_y, height)
            of_weight = tl.zeros((ROWS,), tl.float32)
            of_x = tl.zeros((ROWS,), tl.float32)
            of_y = tl.zeros((ROWS,), tl.float32)
            for corner in tl.static_range(4):  # pyright: ignore - compiled, never iterated
                right, down = corner % 2, corner // 2
                along, across = x if right else 1 - x, y if down else 1 - y
                cells, there = _cells(value, image, head, left + right, top + down, start, width, height, channel,
                                      live, tokens, heads, channels)  # fmt: skip
                product = tl.sum(tl.load(cells, there, 0.0) * fell, axis=1)
                of_weight += product * along * across
                of_x += product * across * (1.0 if right else -1.0)
                of_y += product * along * (1.0 if down else -1.0)
                cells, there = _cells(of_value, image, head, left + right, top + down, start, width, height, channel,
                                      live, tokens, heads, channels)  # fmt: skip
                tl.atomic_add(cells, fell * (weight * along * across)[:, None], there, sem="relaxed")
            tl.store(of_weights + sample, of_weight, live)
            tl.store(of_offsets + 2 * sample, tl.where(inside_x, of_x * weight, 0.0), live)
            tl.store(of_offsets + 2 * sample + 1, tl.where(inside_y, of_y * weight, 0.0), live)


class KernelSamples(torch.autograd.Function):
    """As `crm.model.sampling.deformable_sample`, for float32."""

    @staticmethod
    def forward(
        ctx,
        value: Float[Tensor, "b s m d"],
        offsets: Float[Tensor, "b s m l p 2"],
        weights: Float[Tensor, "b s m l p"],
        sizes: tuple[Size, ...],
    ) -> Float[Tensor, "b s m d"]:
        value, offsets, weights = (x.contiguous() for x in (value, offsets, weights))
        ctx.save_for_backward(value, offsets, weights)
        ctx.sizes = sizes
        found = torch.empty_like(value)
        _launch(_forward, value, offsets, weights, sizes, found)
        return found

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        value, offsets, weights = ctx.saved_tensors
        found = torch.zeros_like(value), torch.empty_like(offsets), torch.empty_like(weights)
        _launch(_backward, value, offsets, weights, ctx.sizes, grad_outputs[0].contiguous(), *found)
        return *found, None


def _launch(kernel, value: Tensor, offsets: Tensor, weights: Tensor, sizes: tuple[Size, ...], *more: Tensor) -> None:
    b, tokens, heads, channels = value.shape
    points, rows = weights.shape[4], b * tokens * heads
    grid, levels = grid_of(sizes, heads, points, value.device, value.dtype), _levels_of(sizes, value.device)
    with torch.cuda.device_of(value):  # Triton starts a kernel on the current device, wherever its tensors are
        kernel[(triton.cdiv(rows, ROWS),)](
            value, offsets, weights, grid.x, grid.y, levels, *more, rows, tokens, heads, channels,
            LEVELS=len(sizes), POINTS=points, WIDE=triton.next_power_of_2(channels), ROWS=ROWS,
            enable_fp_fusion=True,
        )  # fmt: skip


@lru_cache(maxsize=64)
def _levels_of(sizes: tuple[Size, ...], device: torch.device) -> Int[Tensor, "l 3"]:
    """First token, height and width of every level."""
    with torch.inference_mode(False):
        starts = [sum(height * width for height, width in sizes[:i]) for i in range(len(sizes))]
        levels = [[start, *size] for start, size in zip(starts, sizes, strict=True)]
        return torch.tensor(levels, dtype=torch.int32, device=device)
