"""The training objective: supervised terms of up to four head passes and two self-distillation terms.

b = batch, q = queries, k = classes + "no object", l = decoder outputs, s = supervised passes, h w = tokens of stride 4,
H W = pixels, r = rows (one per pass, image and decoder output, in this order), n = pairs of a query with its class
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor
from torch.nn import functional as F

from crm import config
from crm.losses import class_loss, class_weights, dice_loss, mask_loss, self_distillation
from crm.matching import Pairs, assign, matching_costs
from crm.model.backbone import drawn_for
from crm.model.pixel_decoder import at_least_float32
from crm.model.query_decoder import Prediction
from crm.model.segmenter import Hidden, Image, Maps, Segmenter
from crm.points import (
    IGNORED,
    OUTSIDE,
    PADDED,
    Draw,
    Plan,
    PointSource,
    class_shares,
    label_corners,
    point_weights,
    sample_maps,
)

CHUNK = 2**24  # mask values read at points at once, without gradient; bounds memory, not the result

SUPERVISED = ("fused", "rgb", "thermal", "masked")  # also names of weights in config.Loss


@dataclass(frozen=True)
class Targets:
    """Label maps with a border of one pixel, and the classes of each image, ascending."""

    labels: UInt8[Tensor, "b h w"]  # a class, IGNORED or PADDED; in the border OUTSIDE instead of a class
    classes: tuple[tuple[int, ...], ...]
    ignored: bool  # there are such pixels
    padded: bool

    def to(self, device: torch.device | str) -> "Targets":
        return replace(self, labels=self.labels.to(device, non_blocking=True))

    def part(self, images: slice) -> "Targets":
        """Those of some images."""
        return replace(self, labels=self.labels[images], classes=self.classes[images])


@dataclass(frozen=True)
class Part:
    """Which images of a batch these are, where a step is computed in parts: micro-batches, or several processes.

    The losses of the parts, and their gradients, add up to those of the whole batch (to rounding; only BatchNorm sees
    the part alone).
    """

    first: int  # place of the first image in the whole batch
    counts: tuple[int, ...]  # number of classes present in every image of the whole batch


def make_targets(
    labels: UInt8[Tensor, "b h w"],
    num_classes: int,
    ignore_index: int,
    padded: tuple[int, int] | None = None,
    valid: Sequence[tuple[int, int]] | None = None,
) -> Targets:
    """One mask per class present in an image, kept as a label map; call it where the labels are, best on the host.

    Args:
        ignore_index: the id that belongs to no mask.
        padded: height and width the images were padded to, at the right and the bottom; None is those of `labels`.
        valid: height and width of each image in `labels` if they differ; the rest is padding.
    """
    b, height, width = labels.shape
    coded = torch.where(labels == ignore_index, IGNORED, labels).to(torch.uint8)
    for image, (rows, columns) in enumerate(valid or ()):
        coded[image, rows:] = PADDED
        coded[image, :, columns:] = PADDED
    bottom, right = (0, 0) if padded is None else (padded[0] - height, padded[1] - width)
    coded = F.pad(F.pad(coded, (0, right, 0, bottom), value=PADDED), (1, 1, 1, 1))
    for border, inside in ((0, 1), (-1, -2)):  # beyond an ignored or padded pixel is more of the same
        coded[:, border] = coded[:, inside].clamp(min=OUTSIDE)
        coded[:, :, border] = coded[:, :, inside].clamp(min=OUTSIDE)
    offset = 256 * torch.arange(b, device=labels.device)[:, None]
    counts = torch.bincount((coded.flatten(1).long() + offset).flatten(), minlength=256 * b).view(b, 256).cpu()
    if wrong := counts[:, num_classes:OUTSIDE].any(0).nonzero().flatten().tolist():
        ids = [code + num_classes for code in wrong]
        raise ValueError(f"labels contain {ids}; classes are 0 to {num_classes - 1}, ignored is {ignore_index}")
    classes = tuple(tuple(row.nonzero().flatten().tolist()) for row in counts[:, :num_classes])
    return Targets(coded, classes, bool(counts[:, IGNORED].any()), bool(counts[:, PADDED].any()))


@dataclass(frozen=True)
class Losses:
    """Weighted terms of one step; `total` is their sum. `details` splits the supervised ones and is not to be added."""

    terms: dict[str, Float[Tensor, ""]]  # "fused", "rgb", "thermal", "masked", "complementary", "non_local"
    details: dict[str, Float[Tensor, ""]]  # "fused/class", "fused/mask", "fused/dice": they add up to "fused"

    @property
    def total(self) -> Float[Tensor, ""]:
        return torch.stack(list(self.terms.values())).sum()


@dataclass(frozen=True)
class SetLosses:
    """Unweighted supervised losses of every pass and decoder output, and what they rest on."""

    classes: Float[Tensor, "s l"]
    masks: Float[Tensor, "s l"]
    dice: Float[Tensor, "s l"]
    costs: Float[Tensor, "r q t"]
    pairs: Pairs


def objective(
    model: Segmenter,
    image: Image,
    hidden: Hidden | None,
    targets: Targets,
    loss: config.Loss,
    points: PointSource,
    head_passes: str = "batched",
    part: Part | None = None,
) -> Losses:
    """The total loss as coded by the authors, with the configured weights; terms of weight 0 cost nothing.

    Supervision of the fused, RGB and thermal paths on the clean input and of the fused path on the masked one, and
    L1 self-distillation with the clean fused path as teacher: of the masked fused path ("complementary", L_SDC) and of
    both masked single-modality paths ("non_local", L_SDN).

    `loss.count_padding` and `loss.count_ignored` say whether padded and ignored pixels are negatives of every mask, as
    in the released code. If not, a point counts by the bilinear share of what it sees that is labelled: in the mask and
    dice cost of the matching, in both mask losses, and in the number that the mask loss is divided by; a point that
    sees nothing labelled is the last one to be chosen as uncertain.

    Args:
        hidden: tokens hidden in the masked input; only needed if a masked term is.
        head_passes: "batched" runs all paths through branches and head together, "streamed" one by one, with less
            memory for intermediate results. Equal to rounding, but for the random draws of stochastic depth and points.
        part: which images of a larger batch these are; None is a batch of their own.
    """
    part = part or Part(0, tuple(map(len, targets.classes)))
    if hidden is None and (loss.masked or loss.complementary or loss.non_local):
        raise ValueError("loss.masked, loss.complementary and loss.non_local need a masked input: hidden is None")
    needed = needed_passes(loss)
    with drawn_for(part.first, len(image), len(part.counts)):
        maps = _maps(model, image, hidden, needed, together=head_passes == "batched")
    order = sorted(needed, key=lambda name: not needed[name])  # supervised ones first, else as listed
    final: dict[str, Tensor] = {}
    supervised: dict[str, dict[str, Tensor]] = {}
    for group in [order] if head_passes == "batched" else [[name] for name in order]:
        names = [name for name in group if needed[name]]
        together = [torch.cat(level) for level in zip(*(maps[name] for name in group), strict=True)]
        prediction = model.head(together, deep=bool(names), with_masks=len(names) * len(image))
        final |= zip(group, at_least_float32(prediction.class_logits[-1]).chunk(len(group)), strict=True)
        if names:
            with torch.autocast(image.device.type, enabled=False):
                supervised |= _by_pass(set_losses(prediction, names, targets, loss, points, part), names, loss)
    return _weighted(supervised, final, loss, share=len(image) / len(part.counts))


def needed_passes(loss: config.Loss) -> dict[str, bool]:
    """The head passes that terms of weight above 0 need, and whether each is supervised."""
    needed = {
        "fused": loss.fused or loss.complementary or loss.non_local,
        "rgb": loss.rgb,
        "thermal": loss.thermal,
        "masked": loss.masked or loss.complementary,
        "rgb_masked": loss.non_local,
        "thermal_masked": loss.non_local,
    }
    supervised = [name for name in SUPERVISED if getattr(loss, name)]
    return {name: name in supervised for name, wanted in needed.items() if wanted}


def _maps(
    model: Segmenter, image: Image, hidden: Hidden | None, needed: dict[str, bool], together: bool
) -> dict[str, Maps]:
    """Maps of the needed passes; the fusion norms see the clean input, then the masked one."""
    branches: dict[str, Maps] = {}
    for modality in ("rgb", "thermal"):
        clean = modality in needed or "fused" in needed
        masked = f"{modality}_masked" in needed or "masked" in needed
        if clean and masked and together:
            assert hidden is not None
            both = model.branch(modality, image.repeat(2, 1, 1, 1), torch.cat([torch.zeros_like(hidden), hidden]))
            halves = [level.chunk(2) for level in both]
            branches[modality], branches[f"{modality}_masked"] = ([half[i] for half in halves] for i in (0, 1))
            continue
        if clean:
            branches[modality] = model.branch(modality, image)
        if masked:
            branches[f"{modality}_masked"] = model.branch(modality, image, hidden)
    if "fused" in needed:
        branches["fused"] = model.fuse(branches["rgb"], branches["thermal"])
    if "masked" in needed:
        branches["masked"] = model.fuse(branches["rgb_masked"], branches["thermal_masked"])
    return branches


def _by_pass(losses: SetLosses, names: Sequence[str], loss: config.Loss) -> dict[str, dict[str, Tensor]]:
    """Class, mask and dice loss of every pass, weighted and summed over the decoder outputs."""
    parts = {
        "class": loss.class_weight * losses.classes.sum(1),
        "mask": loss.mask_weight * losses.masks.sum(1),
        "dice": loss.dice_weight * losses.dice.sum(1),
    }
    return {name: {part: value[i] for part, value in parts.items()} for i, name in enumerate(names)}


def _weighted(
    supervised: dict[str, dict[str, Tensor]], final: dict[str, Tensor], loss: config.Loss, share: float
) -> Losses:
    """The terms, from the supervised parts and the last class logits of every pass.

    Args:
        share: of the images in the whole batch; what is a mean over images is scaled by it.
    """
    terms, details = {}, {}
    for name, parts in supervised.items():
        weighted = {part: getattr(loss, name) * value for part, value in parts.items()}
        terms[name] = torch.stack(list(weighted.values())).sum()
        details |= {f"{name}/{part}": value.detach() for part, value in weighted.items()}
    if loss.complementary:
        terms["complementary"] = share * loss.complementary * self_distillation(final["fused"], final["masked"])
    if loss.non_local:
        rgb, thermal = (self_distillation(final["fused"], final[f"{name}_masked"]) for name in ("rgb", "thermal"))
        terms["non_local"] = share * loss.non_local * (rgb + thermal)
    return Losses(terms, details)


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
    mask_logits = at_least_float32(prediction.mask_logits.transpose(0, 1).flatten(0, 1))
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
    matched = mask_logits.flatten(0, 1)[pairs.row * queries + pairs.query]
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
    table = table.view(rows, most).to(class_logits.device)
    weights = (loss.class_weight, loss.mask_weight, loss.dice_weight)
    size = max(1, CHUNK // (queries * loss.points))
    costs = []
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        where = draw.match(part).to(mask_logits.dtype)
        corners = label_corners(targets.labels, image_of[part], where)
        values = sample_maps(mask_logits[part], where)
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
    size = max(1, CHUNK // max(candidates, 1))
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
