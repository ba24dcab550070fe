"""The supervised losses of all decoder outputs: matched anew for every one, compared at points, in one computation.

q = queries, k = classes + "no object", l = decoder outputs, s = supervised passes, t = most classes of any image,
h w = tokens of stride 4, r = rows (one per pass, image and decoder output, in this order), n = pairs of a query with
its class, p = points
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from crm import config
from crm.losses import class_loss, class_weights, dice_loss, mask_loss
from crm.matching import Pairs, assign, matching_costs
from crm.model.pixel_decoder import at_least_float32
from crm.model.query_decoder import Prediction
from crm.points import (
    IGNORED,
    PADDED,
    Draw,
    Plan,
    PointSource,
    class_shares,
    label_corners,
    point_weights,
    sample_maps,
)
from crm.targets import Part, Targets
from crm.transfer import sent

# mask values read at points at once, without gradient: bounds memory, not the result. On a CPU they stay in its cache.
CHUNK = 2**24
CHUNK_ON_CPU = 2**19


@dataclass(frozen=True)
class SetLosses:
    """Unweighted supervised losses of every pass and decoder output, and what they rest on."""

    classes: Float[Tensor, "s l"]
    masks: Float[Tensor, "s l"]
    dice: Float[Tensor, "s l"]
    costs: Float[Tensor, "r q t"]
    pairs: Pairs


def set_losses(
    prediction: Prediction,
    names: Sequence[str],
    targets: Targets,
    loss: config.Loss,
    points: PointSource,
    part: Part | None = None,
) -> SetLosses:
    """Supervised losses of all decoder outputs of the passes `names`, the first parts of the prediction's batch.

    Every output is matched anew (released code); all of them in one computation.
    """
    part = part or Part(0, tuple(map(len, targets.classes)))
    passes, images, outputs = len(names), len(targets.classes), len(prediction.class_logits)
    mask_logits = prediction.mask_logits[:, : passes * images].transpose(0, 1).flatten(0, 1)
    class_logits = at_least_float32(prediction.class_logits[:, : passes * images].transpose(0, 1).flatten(0, 1))
    queries, device = class_logits.shape[1], class_logits.device
    kept = int(loss.importance * loss.points)
    plan = Plan(
        names,
        outputs,
        [min(queries, len(present)) for present in targets.classes],
        match=loss.points,
        candidates=int(loss.oversample * loss.points),
        extra=loss.points - kept,
        device=device,
        first=part.first,
        whole=[min(queries, count) for count in part.counts],
    )
    draw = points(plan)
    skip = [IGNORED] * (targets.ignored and not loss.count_ignored)
    skip += [PADDED] * (targets.padded and not loss.count_padding)
    image_of = torch.arange(images, device=device).repeat_interleave(outputs).repeat(passes)
    present = [classes for classes in targets.classes for _ in range(outputs)] * passes

    costs = _costs(class_logits, mask_logits, targets, image_of, present, skip, draw, loss)
    pairs = assign(costs, present)
    target = torch.full((plan.rows, queries), class_logits.shape[2] - 1, device=device)
    target[pairs.row, pairs.query] = pairs.category
    by_output = (passes, images, outputs)
    logits, target = (rows.unflatten(0, by_output).transpose(1, 2) for rows in (class_logits, target))
    everything = class_weights(sum(plan.whole), queries * len(plan.whole), loss.no_object)
    classes = class_loss(logits, target, loss.no_object, everything if len(plan.whole) > images else None)
    matched = at_least_float32(mask_logits.flatten(0, 1)[pairs.row * queries + pairs.query])
    with torch.no_grad():
        where, inside, weight = _loss_points(matched, pairs, targets, image_of, skip, draw, plan.candidates, kept)
    values = sample_maps(matched[:, None], where)[:, 0]
    place = pairs.row // (images * outputs) * outputs + pairs.row % outputs  # pass and output
    count = max(float(sum(part.counts)), 1.0)
    masks, dice = (
        values.new_zeros(passes * outputs).index_add(0, place, each).view(passes, outputs) / count
        for each in (mask_loss(values, inside, weight), dice_loss(values, inside, weight))
    )
    return SetLosses(classes, masks, dice, costs, pairs)


def _chunk(values: Tensor) -> int:
    return CHUNK_ON_CPU if values.device.type == "cpu" else CHUNK


@torch.no_grad()
def _costs(
    class_logits: Float[Tensor, "r q k"],
    mask_logits: Float[Tensor, "r q h w"],
    targets: Targets,
    image_of: Integer[Tensor, " r"],
    present: Sequence[Sequence[int]],
    skip: Sequence[int],
    draw: Draw,
    loss: config.Loss,
) -> Float[Tensor, "r q t"]:
    """Matching costs, some rows at a time; columns beyond a row's classes mean nothing."""
    rows, queries = class_logits.shape[:2]
    most = max(map(len, present))
    table = torch.tensor([[*classes, *[0] * (most - len(classes))] for classes in present], dtype=torch.long)
    table = sent(table.view(rows, most), class_logits.device)
    weights = (loss.class_weight, loss.mask_weight, loss.dice_weight)
    size = max(1, _chunk(mask_logits) // (queries * loss.points))
    costs = []
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        masks = at_least_float32(mask_logits[part])
        where = draw.match(part).to(masks.dtype)
        corners = label_corners(targets.labels, image_of[part], where)
        values = sample_maps(masks, where)
        costs.append(matching_costs(class_logits[part], values, corners, table[part], skip, weights))
    return torch.cat(costs)


def _loss_points(
    matched: Float[Tensor, "n h w"],
    pairs: Pairs,
    targets: Targets,
    image_of: Integer[Tensor, " r"],
    skip: Sequence[int],
    draw: Draw,
    candidates: int,
    kept: int,
) -> tuple[Float[Tensor, "n p 2"], Float[Tensor, "n p"], Float[Tensor, "n p"] | None]:
    """Points of the mask losses, the share of the pair's class there, and the share that counts (None is all of it).

    The `kept` candidates with the smallest absolute logit, and all extra points.
    """
    size = max(1, _chunk(matched) // max(candidates, 1))
    where, inside, weights = [], [], []
    for start in range(0, max(len(matched), 1), size):
        part = slice(start, min(start + size, len(matched)))
        tried, extra = (drawn.to(matched.dtype) for drawn in draw.loss(part))
        image = image_of[pairs.row[part]]
        certainty = sample_maps(matched[part, None], tried)[:, 0].abs()
        if skip:
            counts = point_weights(label_corners(targets.labels, image, tried), skip) > 0
            certainty = torch.where(counts, certainty, torch.inf)
        nearest = certainty.topk(min(kept, tried.shape[1]), dim=1, largest=False, sorted=False).indices
        chosen = torch.view_as_complex(tried).gather(1, nearest)  # one gather for x and y
        where.append(torch.cat([torch.view_as_real(chosen), extra], dim=1))
        corners = label_corners(targets.labels, image, where[-1])
        inside.append(class_shares(corners, pairs.category[part, None])[:, 0])
        weights.append(point_weights(corners, skip) if skip else None)
    return torch.cat(where), torch.cat(inside), torch.cat(weights) if skip else None
