"""Linear, activation, linear: computed some rows at a time, with the hidden values kept once.

The hidden values are four times as large as the input. Rows at a time they stay in the processor's cache and in blocks
that the allocator reuses. Of ReLU what comes out is kept, of GELU what goes in: its value is computed again.

n = rows, c = channels, k = hidden channels
"""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 2**10  # at a time on a CPU; elsewhere all of them
ROWS_OF_HALF = 2**14  # in half precision, whose products want long sums
Activation = Literal["relu", "gelu"]


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        wide: Tensor,
        wide_bias: Tensor,
        narrow: Tensor,
        narrow_bias: Tensor,
        activation: Activation,
        keep: bool,
    ) -> Tensor:
        out, kept = x.new_empty(len(x), len(narrow)), []
        for rows in _parts(x):
            hidden = torch.addmm(wide_bias, x[rows], wide.T)
            if activation == "relu":
                hidden.relu_()
            if keep:
                kept.append(hidden)
            hidden = hidden if activation == "relu" else F.gelu(hidden)
            torch.addmm(narrow_bias, hidden, narrow.T, out=out[rows])
        ctx.save_for_backward(x, wide, narrow, *kept)
        ctx.activation = activation
        return out

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, wide, narrow, *kept = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        of_x = torch.empty_like(x)
        exact = torch.promote_types(x.dtype, torch.float32)  # sums over all rows are not made in half precision
        of_wide, of_wide_bias, of_narrow = (
            x.new_zeros(shape, dtype=exact) for shape in (wide.shape, wide.shape[:1], narrow.shape)
        )
        for rows, before in zip(_parts(x), kept, strict=True):
            hidden = before if ctx.activation == "relu" else F.gelu(before)
            _add_product(of_narrow, grad[rows].T, hidden)
            of_hidden = grad[rows] @ narrow
            if ctx.activation == "relu":
                of_hidden = torch.ops.aten.threshold_backward(of_hidden, hidden, 0)
            else:
                of_hidden = torch.ops.aten.gelu_backward(of_hidden, before)
            _add_product(of_wide, of_hidden.T, x[rows])
            of_wide_bias += of_hidden.sum(0)
            torch.mm(of_hidden, wide, out=of_x[rows])
        return of_x, of_wide, of_wide_bias, of_narrow, grad.sum(0), None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _parts(x: Tensor) -> Iterator[slice]:
    size = max(len(x), 1)
    if x.device.type == "cpu":
        size = ROWS_OF_HALF if x.element_size() == 2 else ROWS
    for start in range(0, len(x), size):
        yield slice(start, start + size)


def feed_forward(
    x: Float[Tensor, "*outer c"], wide: nn.Linear, narrow: nn.Linear, activation: Activation
) -> Float[Tensor, "*outer c"]:
    """`narrow(activation(wide(x)))`, to rounding the same with its gradients; "gelu" is the exact one."""
    if torch.compiler.is_compiling():  # a backward pass of this kind is not traced
        return narrow((F.relu if activation == "relu" else F.gelu)(wide(x)))
    kind = x.device.type
    parameters = [wide.weight, wide.bias, narrow.weight, narrow.bias]
    if torch.is_autocast_enabled(kind):
        x, *parameters = (one.to(torch.get_autocast_dtype(kind)) for one in (x, *parameters))
    with torch.autocast(kind, enabled=False):
        found = _FeedForward.apply(x.reshape(-1, x.shape[-1]), *parameters, activation, torch.is_grad_enabled())
    assert isinstance(found, Tensor)
    return found.view(*x.shape[:-1], -1)
