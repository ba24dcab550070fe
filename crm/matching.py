"""Assignment of queries to the classes of an image, for many decoder outputs at once.

r = rows (one per pass, image and decoder output), q = queries, k = classes + "no object", t = most classes of any
image, p = points, h w = mask logits, n = pairs
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Integer
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from crm.points import Corners, class_shares, point_weights
from crm.transfer import sent

Weights = tuple[float, float, float]  # of class, mask and dice cost


class Pairs(NamedTuple):
    """Queries with their classes, row by row, inside a row by query."""

    row: Integer[Tensor, " n"]
    query: Integer[Tensor, " n"]
    category: Integer[Tensor, " n"]


@torch.no_grad()
def matching_costs(
    class_logits: Float[Tensor, "r q k"],
    mask_values: Float[Tensor, "r q p"],
    corners: Corners,
    classes: Integer[Tensor, "r t"],
    skip: Sequence[int],
    weights: Weights,
) -> Float[Tensor, "r q t"]:
    """Weighted sum of class, mask and dice cost of every query for every class (released code).

    Mask logits and labels are read at the same points for all queries of a row. A point that sees labels in `skip`
    (ignored, padded) counts by the share of the rest, in both mask costs; the mask cost is the mean over what counts.
    `mask_values` are spent: their memory is used again, while it is in the cache.
    """
    target = class_shares(corners, classes)
    weight = point_weights(corners, skip)[:, None] if skip else torch.ones_like(corners.shares[:, :1])
    # sums over points as matrix products, classes first: the values of a point lie side by side
    # cross-entropy of logit x and target t is softplus(x) - x t
    cross_entropy = (weight @ F.softplus(mask_values).mT).mT - (target @ mask_values.mT).mT
    cross_entropy = cross_entropy / weight.sum(2, keepdim=True).clamp(min=1e-6)
    sums = (torch.cat([target * weight, weight], dim=1) @ mask_values.sigmoid_().mT).mT  # last: in their place
    overlap, size = sums.split([target.shape[1], 1], dim=2)
    dice = 1 - (2 * overlap + 1) / (size + target.sum(2)[:, None] + 1)
    wanted = class_logits.softmax(2).gather(2, classes[:, None].expand(-1, class_logits.shape[1], -1))
    return weights[1] * cross_entropy + weights[2] * dice - weights[0] * wanted


def assign(costs: Float[Tensor, "r q t"], classes: Sequence[Sequence[int]]) -> Pairs:
    """The cheapest one-to-one assignment of each row, found on the host after one transfer.

    Args:
        classes: of each row; the first of its columns in `costs`.
    """
    table = costs.cpu().numpy()
    if not np.isfinite(table).all():
        broken = int((~np.isfinite(table).all(axis=(1, 2))).sum())
        raise FloatingPointError(
            f"matching costs of {broken} of {len(table)} decoder outputs are not finite: "
            "the class or mask logits are nan or inf, so training has diverged"
        )
    found = [np.zeros((3, 0), np.int64)]
    for row, present in enumerate(classes):
        query, column = linear_sum_assignment(table[row, :, : len(present)])
        found.append(np.stack([np.full_like(query, row), query, np.asarray(present, np.int64)[column]]))
    return Pairs(*sent(torch.from_numpy(np.concatenate(found, axis=1)), costs.device))
