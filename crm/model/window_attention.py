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
        return torch.cat([_attend(part, qkv_bias, bias, windows) for (part,) in _parts(qkv)])

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        qkv, *biases = ctx.saved_tensors
        of_qkv, of_biases = [], [torch.zeros_like(one) for one in biases]
        for part, grad in _parts(qkv, grad_outputs[0]):
            inputs = [one.detach().requires_grad_() for one in (part, *biases)]
            with torch.enable_grad():
                found = _attend(inputs[0], inputs[1], inputs[2], ctx.windows)
            of_part, *more = torch.autograd.grad(found, inputs, grad)
            of_qkv.append(of_part)
            torch._foreach_add_(of_biases, more)
        return torch.cat(of_qkv), of_biases[0], of_biases[1], None


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    _, height, width, _ = tensors[0].shape
    yield from zip(*(one.split(max(1, TOKENS // (height * width))) for one in tensors), strict=True)


def _attend(
    qkv: Float[Tensor, "b h w p"], qkv_bias: Float[Tensor, " p"], bias: Float[Tensor, "m n n"], windows: Windows
) -> Float[Tensor, "b h w c"]:
    b, h, w, _ = qkv.shape
    (window, shift), heads = windows, len(bias)
    qkv = F.pad(qkv, (0, 0, 0, -w % window, 0, -h % window))
    height, width = qkv.shape[1:3]
    if shift:
        qkv = qkv.roll((-shift, -shift), (1, 2))
    qkv = qkv.view(b, height // window, window, width // window, window, 3, heads, -1)
    qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(2, 3)
    q, k, v = qkv + qkv_bias.to(qkv.dtype).view(3, 1, 1, heads, 1, -1)  # b windows heads n d
    scores = (q * q.shape[4] ** -0.5) @ k.mT + bias
    if shift:
        scores += shift_mask(height, width, window, shift, qkv.device)
    x = scores.softmax(dim=4).to(v.dtype) @ v
    x = x.view(b, height // window, width // window, heads, window, window, -1)
    x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, height, width, -1)
    if shift:
        x = x.roll((shift, shift), (1, 2))
    return x[:, :h, :w]
