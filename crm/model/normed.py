"""Layer norm and what follows it, with the normalised values computed again in the backward pass, not kept.

They are as large as the input, which is kept anyway, and are had from it in one pass over it. On a CPU alone: there
memory is what an operation waits for.

n = tokens, c = channels, k = output channels
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Norm(NamedTuple):
    """What a layer norm is."""

    scale: Float[Tensor, " c"]
    shift: Float[Tensor, " c"]
    eps: float

    @classmethod
    def of(cls, layer: nn.LayerNorm) -> "Norm":
        return cls(layer.weight, layer.bias, layer.eps)

    def __call__(self, x: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        return F.layer_norm(x, x.shape[1:], *self)


class Normed:
    """Normalised values, and the way back through the norm."""

    def __init__(self, x: Float[Tensor, "n c"], norm: Norm) -> None:
        self._x, self._norm = x, norm
        self.values, *self._statistics = torch.native_layer_norm(x, x.shape[1:], *norm)

    def gradients(self, grad: Float[Tensor, "n c"]) -> tuple[Float[Tensor, "n c"], Tensor, Tensor]:
        """Of input, scale and shift, `grad` being that of the values."""
        scale, shift, _ = self._norm
        return torch.ops.aten.native_layer_norm_backward(
            grad, self._x, grad.shape[1:], *self._statistics, scale, shift, [True, True, True]
        )


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, shift, weight)
        ctx.eps = eps
        return Norm(scale, shift, eps)(x).to(weight.dtype) @ weight.T

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight = ctx.saved_tensors
        grad = grad_outputs[0]
        normed = Normed(x, Norm(scale, shift, ctx.eps))
        of_weight = grad.T @ normed.values.to(weight.dtype)
        of_x, of_scale, of_shift = normed.gradients((grad @ weight).to(normed.values.dtype))
        return of_x, of_scale, of_shift, None, of_weight


def can_recompute(x: Tensor) -> bool:
    """Whether this is for such a tensor; a backward pass of this kind is not traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def normed_linear(
    x: Float[Tensor, "*outer c"], layer: nn.LayerNorm, weight: Float[Tensor, "k c"]
) -> Float[Tensor, "*outer k"]:
    """`F.linear(layer(x), weight)`, to rounding the same with its gradients."""
    if not can_recompute(x):
        return F.linear(layer(x), weight)
    if torch.is_autocast_enabled("cpu"):
        weight = weight.to(torch.get_autocast_dtype("cpu"))
    with torch.autocast("cpu", enabled=False):
        found = _NormedLinear.apply(x.reshape(-1, x.shape[-1]), *Norm.of(layer), weight)
    assert isinstance(found, Tensor)
    return found.view(*x.shape[:-1], len(weight))
