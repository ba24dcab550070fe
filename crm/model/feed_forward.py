"""Norm, linear, activation, linear: computed some rows at a time, with the hidden values kept once or not at all.

The hidden values are four times as large as the input. Rows at a time they stay in the processor's cache and in blocks
that the allocator reuses. Of ReLU what comes out is kept, of GELU what goes in: its value is computed again. Where the
layers are narrow that too is: such layers have the most tokens, and the product is small for what it gives.

n = rows, c = channels, k = hidden channels
"""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from crm.model.normed import Norm, Normed, can_recompute

ROWS = 2**10  # at a time on a CPU; elsewhere all of them
ROWS_OF_HALF = 2**14  # in half precision, whose products want long sums
NARROW = 96  # channels per byte of a value, up to which hidden values of GELU are not kept on a CPU
Activation = Literal["relu", "gelu"]


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        eps: float,
        wide: Tensor,
        wide_bias: Tensor,
        narrow: Tensor,
        narrow_bias: Tensor,
        activation: Activation,
        kind: torch.dtype,
        keep: bool,
    ) -> Tensor:
        norm = _norm(scale, shift, eps)
        wide, wide_bias, narrow, narrow_bias = (one.to(kind) for one in (wide, wide_bias, narrow, narrow_bias))
        out, kept = x.new_empty(len(x), len(narrow), dtype=kind), []
        for rows in _parts(x, kind):
            seen = x[rows] if norm is None else norm(x[rows]).to(kind)
            hidden = torch.addmm(wide_bias, seen, wide.T)
            if activation == "relu":
                hidden.relu_()
            if keep:
                kept.append(hidden)
            hidden = hidden if activation == "relu" else F.gelu(hidden)
            torch.addmm(narrow_bias, hidden, narrow.T, out=out[rows])
        ctx.save_for_backward(x, scale, shift, wide, wide_bias, narrow, *kept)
        ctx.eps, ctx.activation = eps, activation
        return out

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, wide, wide_bias, narrow, *kept = ctx.saved_tensors
        norm = _norm(scale, shift, ctx.eps)
        grad = grad_outputs[0].contiguous()
        exact = torch.promote_types(wide.dtype, torch.float32)  # sums over all rows are not made in half precision
        of_x = torch.empty_like(x)
        of_wide = of_narrow = None
        of_vectors: list[Tensor] = []  # the wide bias, and scale and shift of a norm
        for number, rows in enumerate(_parts(x, wide.dtype)):
            normed = None if norm is None else Normed(x[rows], norm)
            seen = x[rows] if normed is None else normed.values.to(wide.dtype)
            before = kept[number] if kept else torch.addmm(wide_bias, seen, wide.T)
            hidden = before if ctx.activation == "relu" else F.gelu(before)
            of_narrow = _add_product(of_narrow, grad[rows].T, hidden, exact)
            of_hidden = grad[rows] @ narrow
            if ctx.activation == "relu":
                of_hidden = torch.ops.aten.threshold_backward(of_hidden, hidden, 0)
            else:
                of_hidden = torch.ops.aten.gelu_backward(of_hidden, before)
            of_wide = _add_product(of_wide, of_hidden.T, seen, exact)
            found = [of_hidden.sum(0).to(exact)]
            if normed is None:
                torch.mm(of_hidden, wide, out=of_x[rows])
            else:
                of_x[rows], *of_norm = normed.gradients((of_hidden @ wide).to(normed.values.dtype))
                found += of_norm
            of_vectors = found if number == 0 else list(torch._foreach_add(of_vectors, found))
        of_bias, of_scale, of_shift = (*of_vectors, None, None)[:3]
        return of_x, of_scale, of_shift, None, of_wide, of_bias, of_narrow, grad.sum(0).to(exact), None, None, None


def _norm(scale: Tensor | None, shift: Tensor | None, eps: float) -> Norm | None:
    return None if scale is None or shift is None else Norm(scale, shift, eps)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, exact: torch.dtype) -> Tensor:
    """The total with a @ b, in place."""
    if total is None:
        return (a @ b).to(exact)
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)


def _parts(x: Tensor, kind: torch.dtype) -> Iterator[slice]:
    size = max(len(x), 1)
    if x.device.type == "cpu":
        size = ROWS_OF_HALF if kind.itemsize == 2 else ROWS
    for start in range(0, max(len(x), 1), size):
        yield slice(start, start + size)


def feed_forward(
    x: Float[Tensor, "*outer c"],
    wide: nn.Linear,
    narrow: nn.Linear,
    activation: Activation,
    norm: nn.LayerNorm | None = None,
) -> Float[Tensor, "*outer c"]:
    """`narrow(activation(wide(norm(x))))`, to rounding the same with its gradients; "gelu" is the exact one.

    Args:
        norm: None is without.
    """
    if norm is not None and not can_recompute(x):
        x, norm = norm(x), None
    if torch.compiler.is_compiling():  # a backward pass of this kind is not traced
        return narrow((F.relu if activation == "relu" else F.gelu)(wide(x)))
    device = x.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else wide.weight.dtype
    before = (None, None, 0.0) if norm is None else Norm.of(norm)
    with torch.autocast(device, enabled=False):
        flat = x.reshape(-1, x.shape[-1])
        again = device == "cpu" and activation == "gelu" and x.shape[-1] <= NARROW * kind.itemsize
        found = _FeedForward.apply(
            flat if norm is not None else flat.to(kind),
            *before,
            *(wide.weight, wide.bias, narrow.weight, narrow.bias),
            *(activation, kind, torch.is_grad_enabled() and not again),
        )
    assert isinstance(found, Tensor)
    return found.view(*x.shape[:-1], narrow.out_features)
