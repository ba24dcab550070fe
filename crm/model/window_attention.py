"""Attention inside the windows of a map, computed some images at a time.

What lies between the packed projection and the result is as large as several maps. On a CPU it is made image by image,
so that it stays in the processor's cache, and made again in the backward pass, so that the projection alone is kept.

b = batch, h w = height and width in tokens, c = channels, p = 3c, m = heads, n = tokens of a window
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

TOKENS = 2**13  # at a time on a CPU, at least one image


class Windows(NamedTuple):
    """How a map is cut: padded to a multiple of `side`, then rolled by `shift`, then partitioned (released code)."""

    side: int
    shift: int


@lru_cache(maxsize=64)
def shift_mask(
    height: int, width: int, window: int, shift: int, device: torch.device
) -> Float[Tensor, "windows 1 n n"]:
    """-inf between tokens of one window that the cyclic shift brought together, else 0; sizes are the padded ones.

    The released code has -100. That leaves weights of 1e-44, which change nothing but are denormal numbers: matrix
    products with them take twenty times as long on a CPU.
    """
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training later
        rows, columns = (_band(side, window, shift, device) for side in (height, width))
        band = 3 * rows[:, None] + columns
        band = band.view(height // window, window, width // window, window).transpose(1, 2).reshape(-1, window**2)
        apart = band[:, None, :, None] != band[:, None, None, :]
        return torch.zeros(apart.shape, device=device).masked_fill(apart, -torch.inf)


def _band(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Which of three bands a row or column of the shifted map belongs to."""
    place = torch.arange(side, device=device)
    return (place >= side - window).long() + (place >= side - shift).long()


def window_attention(
    qkv: Float[Tensor, "b h w p"], qkv_bias: Float[Tensor, " p"], bias: Float[Tensor, "m n n"], windows: Windows
) -> Float[Tensor, "b h w c"]:
    """Attention of every token to those of its window, heads side by side.

    Args:
        qkv: query, key and value of every token without their bias, which padded tokens have too: those are attended
            to, and the bias is all they are.
        bias: on the scores, by place in the window.
    """
    if qkv.device.type != "cpu" or torch.compiler.is_compiling():  # a backward pass of this kind is not traced
        return _attend(qkv, qkv_bias, bias, windows)
    found = _ImageByImage.apply(qkv, qkv_bias, bias, windows)
    assert isinstance(found, Tensor)
    return found


class _ImageByImage(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, qkv: Tensor, qkv_bias: Tensor, bias: Tensor, windows: Windows) -> Tensor:
        ctx.save_for_backward(qkv, qkv_bias, bias)
        ctx.windows = windows
        return _whole([_attend(part, qkv_bias, bias, windows) for (part,) in _parts(qkv)])

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        qkv, *biases = ctx.saved_tensors
        of_qkv, of_biases = [], [torch.zeros_like(one) for one in biases]
        for part, grad in _parts(qkv, grad_outputs[0]):
            of_part, *more = _gradients(part, *biases, ctx.windows, grad)
            of_qkv.append(of_part)
            torch._foreach_add_(of_biases, more)
        return _whole(of_qkv), of_biases[0], of_biases[1], None


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    _, height, width, _ = tensors[0].shape
    yield from zip(*(one.split(max(1, TOKENS // (height * width))) for one in tensors), strict=True)


def _whole(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


class _Attention(NamedTuple):
    """Of every head in every window."""

    query: Float[Tensor, "b windows m n d"]  # scaled
    key: Float[Tensor, "b windows m n d"]
    value: Float[Tensor, "b windows m n d"]
    weights: Float[Tensor, "b windows m n n"]


def _attend(
    qkv: Float[Tensor, "b h w p"], qkv_bias: Float[Tensor, " p"], bias: Float[Tensor, "m n n"], windows: Windows
) -> Float[Tensor, "b h w c"]:
    found = _attention(qkv, qkv_bias, bias, windows)
    x = found.weights.to(found.value.dtype) @ found.value
    return _cropped(_joined(x[None], windows, qkv.shape), windows, qkv.shape)


def _attention(
    qkv: Float[Tensor, "b h w p"], qkv_bias: Float[Tensor, " p"], bias: Float[Tensor, "m n n"], windows: Windows
) -> _Attention:
    heads = len(bias)
    q, k, v = _cut(qkv, 3, heads, windows) + qkv_bias.to(qkv.dtype).view(3, 1, 1, heads, 1, -1)
    q = q * q.shape[4] ** -0.5
    scores = q @ k.mT + bias
    if windows.shift:
        height, width = (side + -side % windows.side for side in qkv.shape[1:3])
        scores += shift_mask(height, width, *windows, qkv.device)
    return _Attention(q, k, v, scores.softmax(dim=4))


def _gradients(
    qkv: Float[Tensor, "b h w p"],
    qkv_bias: Float[Tensor, " p"],
    bias: Float[Tensor, "m n n"],
    windows: Windows,
    grad: Float[Tensor, "b h w c"],
) -> tuple[Float[Tensor, "b h w p"], Float[Tensor, " p"], Float[Tensor, "m n n"]]:
    """Of projection and biases, `grad` being that of the result: what is `_attend`'s, in fewer and larger steps."""
    q, k, v, weights = _attention(qkv, qkv_bias, bias, windows)
    grad = _cut(grad.to(v.dtype), 1, len(bias), windows)[0]
    of_weights = (grad @ v.mT).to(weights.dtype)
    of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, 4, weights.dtype)
    of_bias = of_scores.sum((0, 1))
    of_scores = of_scores.to(q.dtype)
    found = q.new_empty(3, *q.shape)
    pairs = ((of_scores, k), (of_scores.mT, q), (weights.to(v.dtype).mT, grad))
    for out, (a, b) in zip(found, pairs, strict=True):
        torch.bmm(a.flatten(0, 2), b.flatten(0, 2), out=out.flatten(0, 2))
    found[0] *= q.shape[4] ** -0.5
    whole = _joined(found, windows, qkv.shape)
    return _cropped(whole, windows, qkv.shape), whole.flatten(0, 2).sum(0), of_bias


def _cut(x: Float[Tensor, "b h w _"], parts: int, heads: int, windows: Windows) -> Float[Tensor, "_ b windows m n d"]:
    """The windows of a map whose channels are several parts of all heads."""
    b, h, w, _ = x.shape
    side, shift = windows
    x = F.pad(x, (0, 0, 0, -w % side, 0, -h % side))
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    x = x.view(b, x.shape[1] // side, side, x.shape[2] // side, side, parts, heads, -1)
    return x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(2, 3)


def _joined(x: Float[Tensor, "_ b windows m n d"], windows: Windows, shape: torch.Size) -> Float[Tensor, "b _ _ _"]:
    """The padded, rolled map that `_cut` cuts, of one of this shape."""
    parts, b, _, heads, _, channels = x.shape
    side = windows.side
    rows, columns = (-(-length // side) for length in shape[1:3])
    x = x.view(parts, b, rows, columns, heads, side, side, channels)
    return x.permute(1, 2, 5, 3, 6, 0, 4, 7).reshape(b, rows * side, columns * side, -1)


def _cropped(x: Float[Tensor, "b _ _ c"], windows: Windows, shape: torch.Size) -> Float[Tensor, "b h w c"]:
    if windows.shift:
        x = x.roll((windows.shift, windows.shift), (1, 2))
    return x[:, : shape[1], : shape[2]]
