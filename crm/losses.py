"""The losses: class, mask and dice loss of matched queries, and self-distillation.

b = batch, q = queries, k = classes + "no object", n = pairs of a query with its class, p = points
"""

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F


def class_loss(
    logits: Float[Tensor, "*outer b q k"],
    target: Integer[Tensor, "*outer b q"],
    no_object: float,
    divisor: float | None = None,
) -> Float[Tensor, "*outer"]:
    """Cross-entropy over all queries of a batch; the last class has weight `no_object`, and the sum of the weights
    divides (released code), or the `divisor`, which is that sum over a larger batch."""
    missed = -logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    weight = torch.where(target == logits.shape[-1] - 1, no_object, 1.0)  # float32, as the released buffer is
    weight = weight.to(missed.dtype)
    return (missed * weight).sum((-2, -1)) / (weight.sum((-2, -1)) if divisor is None else divisor)


def class_weights(matched: int, queries: int, no_object: float) -> float:
    """The sum of the weights of `class_loss` over `queries` queries, of which `matched` have a class."""
    return matched + (queries - matched) * no_object


def mask_loss(
    values: Float[Tensor, "n p"], target: Float[Tensor, "n p"], weight: Float[Tensor, "n p"] | None
) -> Float[Tensor, " n"]:
    """Binary cross-entropy of mask logits, mean over the points (released code).

    `weight` is the share of a point that counts, and `target` the share that is of the class; without weights all of it
    counts. The weights' sum divides.
    """
    softplus = F.softplus(values)
    if weight is None:
        return (softplus - values * target).mean(1)
    return (softplus * weight - values * target).sum(1) / weight.sum(1).clamp(min=1e-6)


def dice_loss(
    values: Float[Tensor, "n p"], target: Float[Tensor, "n p"], weight: Float[Tensor, "n p"] | None
) -> Float[Tensor, " n"]:
    """One minus the Dice overlap of mask probability and target, smoothed by 1 (released code); see `mask_loss`."""
    probability = values.sigmoid()
    size = probability.sum(1) if weight is None else (probability * weight).sum(1)
    return 1 - (2 * (probability * target).sum(1) + 1) / (size + target.sum(1) + 1)


def self_distillation(teacher: Float[Tensor, "b q k"], student: Float[Tensor, "b q k"]) -> Float[Tensor, ""]:
    """Mean L1 distance of raw class logits, query by query; the teacher gets no gradient (released code).

    One form of several: see `crm.distillation`.
    """
    return (teacher.detach() - student).abs().mean()
