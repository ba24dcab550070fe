"""The training objective: supervised terms of up to six head passes and two self-distillation terms.

b = batch, q = queries, k = classes + "no object", l = decoder outputs, s = supervised passes, h w = tokens of stride 4,
H W = pixels, r = rows (one per pass, image and decoder output, in this order), n = pairs of a query with its class
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor
from torch.nn import functional as F

from crm import config
from crm.distillation import DISTILLATIONS, Counted, Form, Output, distance, evaluating
from crm.losses import class_loss, class_weights, dice_loss, mask_loss
from crm.masking import FILLS, TOKEN
from crm.matching import Pairs, assign, matching_costs
from crm.model.backbone import drawn_for
from crm.model.pixel_decoder import at_least_float32
from crm.model.query_decoder import Prediction
from crm.model.segmenter import Hidden, Image, Maps, Segmenter
from crm.names import chosen
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

# mask values read at points at once, without gradient: bounds memory, not the result. On a CPU they stay in its cache.
CHUNK = 2**24
CHUNK_ON_CPU = 2**19

CLEAN = ("fused", "rgb", "thermal")  # passes on the clean input; also names of weights in config.Loss, as the next
MASKED = ("masked", "rgb_masked", "thermal_masked")  # the same three on the masked input
STUDENTS = {"complementary": ("masked",), "non_local": ("rgb_masked", "thermal_masked")}  # of the distilled terms


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


@dataclass(frozen=True)
class View:
    """What the masked passes look at, where it is not the clean input: images and labels of their own.

    There are as many as clean ones, and each takes the place of the clean one in the batch.
    """

    image: Image
    targets: Targets
    counts: tuple[int, ...] = ()  # as in Part, of these labels; () is a batch of their own

    def part(self, images: slice) -> "View":
        """Some images of it."""
        return replace(self, image=self.image[images], targets=self.targets.part(images))


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
    """Weighted terms of one step; `total` is their sum. `details` says more about them and is not to be added."""

    terms: dict[str, Float[Tensor, ""]]  # "fused", "rgb", ...: those of config.TERMS, and "sparsity" of a fusion
    details: dict[str, Float[Tensor, ""]]  # "fused/class", ...: add up to "fused"; "reliance/...": of the fusion

    @property
    def total(self) -> Float[Tensor, ""]:
        return torch.stack(list(self.terms.values())).sum()

    def add(self, other: "Losses") -> None:
        """Adds those of other passes; a term may be of several."""
        for mine, theirs in ((self.terms, other.terms), (self.details, other.details)):
            mine.update({name: mine[name] + value if name in mine else value for name, value in theirs.items()})

    def in_order(self) -> "Losses":
        """The same with its terms in the order of config.TERMS, then those of a fusion."""
        place = {name: i for i, name in enumerate(config.TERMS)}
        return replace(self, terms=dict(sorted(self.terms.items(), key=lambda term: place.get(term[0], len(place)))))


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
    view: View | None = None,
    fill: str = "token",
    teacher: Segmenter | None = None,
    factors: Mapping[str, float] | None = None,
    backward: bool = False,
) -> Losses:
    """The total loss as coded by the authors, with the configured weights; terms of weight 0 cost nothing.

    Supervision of the fused, RGB and thermal paths on the clean input and of the same on the masked one (the released
    code: of the fused one alone), and self-distillation with the clean fused path as teacher: of the masked fused path
    ("complementary", L_SDC) and of both masked single-modality paths ("non_local", L_SDN).

    `loss.count_padding` and `loss.count_ignored` say whether padded and ignored pixels are negatives of every mask, as
    in the released code. If not, a point counts by the bilinear share of what it sees that is labelled: in the mask and
    dice cost of the matching, in both mask losses, and in the number that the mask loss is divided by; a point that
    sees nothing labelled is the last one to be chosen as uncertain.

    Args:
        hidden: tokens hidden in the masked input; only needed if a masked term is and there is no `view`.
        head_passes: "batched" runs all paths through branches and head together, "streamed" one by one, with less
            memory for intermediate results. Equal to rounding, but for the random draws of stochastic depth and points.
        part: which images of a larger batch these are; None is a batch of their own.
        view: images and labels of the masked input; None is the clean input's.
        fill: what stands for a hidden token, a key of crm.masking.FILLS.
        teacher: the network that `loss.teacher` "ema" and "eval" ask in evaluation mode; None is `model`.
        factors: by pass, on what it adds to the loss, 1 where there is none; a pass of factor 0 is not computed
            (`crm.passes`).
        backward: adds the gradients of the total to those of the parameters; the losses then have none. With "streamed"
            the backward pass of every path through the head follows its forward pass, so that the intermediate results
            of one of them are held at a time.
    """
    part = part or Part(0, tuple(map(len, targets.classes)))
    if hidden is None and view is None and any(getattr(loss, name) for name in (*MASKED, *STUDENTS)):
        raise ValueError(
            "loss.masked, loss.rgb_masked, loss.thermal_masked, loss.complementary and loss.non_local need a masked "
            "input: hidden is None, and so is view"
        )
    form = chosen("distillation", loss.distillation, DISTILLATIONS)
    factor = {name: (factors or {}).get(name, 1.0) for name in (*CLEAN, *MASKED)}
    needed = {name: is_supervised for name, is_supervised in needed_passes(loss).items() if factor[name]}
    distilled = {name for term, names in STUDENTS.items() if getattr(loss, term) for name in names if factor[name]}
    taught = {"fused"} if distilled and loss.teacher == "train" else set()
    second = _second(image, hidden, view, fill)
    # before the passes of the step, which move the running statistics
    wanted = _asked(teacher or model, image, form) if distilled and not taught else None
    batched = head_passes == "batched"
    with drawn_for(part.first, len(image), len(part.counts)):
        whole = _maps(model, image, second, {*needed, *distilled, *taught}, together=batched or backward)
    maps = {name: _cut(levels) for name, levels in whole.items()} if backward else whole
    passes = _Passes(model, maps, needed, distilled, wanted, targets, loss, points, part, view, factor)
    # supervised ones first where masks are asked of the first ones; else the teacher before its students
    order = sorted(needed, key=lambda name: not needed[name]) if batched else list(needed)
    order += [name for name in (*CLEAN, *MASKED) if name in taught | distilled and name not in needed]
    losses = Losses({}, {})
    for group in [order] if batched else [[name] for name in order]:
        losses.add(_descended(passes.losses(group), backward))
    losses.add(_descended(passes.of_fusion(), backward))
    if backward:
        _descend_maps(whole, maps)
    return losses.in_order()


def needed_passes(loss: config.Loss) -> dict[str, bool]:
    """The head passes that terms of weight above 0 need, and whether each is supervised."""
    supervised = {
        "fused": loss.fused,
        "rgb": loss.rgb,
        "thermal": loss.thermal,
        "masked": loss.masked,
        "rgb_masked": loss.rgb_masked,
        "thermal_masked": loss.thermal_masked,
    }
    distilled = set()
    if chosen("distillation", loss.distillation, DISTILLATIONS).needs != {"maps"}:
        for term, students in STUDENTS.items():
            distilled |= {*students, *(["fused"] if loss.teacher == "train" else [])} if getattr(loss, term) else set()
    return {name: weight > 0 for name, weight in supervised.items() if weight or name in distilled}


@dataclass
class _Passes:
    """The passes of one step, and what their losses rest on."""

    model: Segmenter
    maps: dict[str, Maps]
    needed: dict[str, bool]  # through the head, and whether it is supervised
    distilled: set[str]
    teacher: Output | None  # None until the pass that is it
    targets: Targets
    loss: config.Loss
    points: PointSource
    part: Part
    view: View | None
    factor: Mapping[str, float]

    def losses(self, names: Sequence[str]) -> Losses:
        """What these passes, computed together, add to the losses.

        Args:
            names: supervised ones first; the teacher of a student is among them or was in a call before.
        """
        images = len(self.maps[names[0]][0])
        device = self.maps[names[0]][0].device.type
        form = DISTILLATIONS[self.loss.distillation]
        asked = [name for name in names if name in self.needed]
        supervised = [name for name in asked if self.needed[name]]
        said = {name: Output(maps=self.maps[name]) for name in names}
        losses = Losses({}, {})
        if asked:
            compared = self.distilled and "mask_logits" in form.needs
            with_masks = asked if compared else supervised
            together = [torch.cat(level) for level in zip(*(self.maps[name] for name in asked), strict=True)]
            prediction = self.model.head(together, deep=bool(supervised), with_masks=len(with_masks) * images)
            classes = at_least_float32(prediction.class_logits[-1]).split(images)
            masks = prediction.mask_logits[-1].split(images) if compared else [None] * len(asked)
            said |= {name: Output(classes[i], masks[i], self.maps[name]) for i, name in enumerate(asked)}
            with torch.autocast(device, enabled=False):
                for found, these in _by_labels(prediction, supervised, self.targets, self.part, self.view):
                    of_set = set_losses(found, these.names, these.targets, self.loss, self.points, these.part)
                    losses.add(_supervision(of_set, these.names, self.loss, self.factor))
        self.teacher = self.teacher or said.get("fused")
        with torch.autocast(device, enabled=False):
            losses.terms.update(self._distillation(said))
        return losses

    def _distillation(self, said: Mapping[str, Output]) -> dict[str, Tensor]:
        """The distilled terms of the students among these passes."""
        loss, terms = self.loss, {}
        counted = None if loss.count_padding else _counted(self.targets)
        for term, names in STUDENTS.items():
            students = [name for name in names if getattr(loss, term) and name in self.distilled and name in said]
            if students:
                assert self.teacher is not None
                apart = [
                    self.factor[name] * distance(loss.distillation, self.teacher, said[name], counted, loss.temperature)
                    for name in students
                ]
                terms[term] = self._share * getattr(loss, term) * torch.stack(apart).sum()
        return terms

    @property
    def _share(self) -> float:
        """Of these images in the whole batch."""
        return len(self.targets.classes) / len(self.part.counts)

    def of_fusion(self) -> Losses:
        """What the fusion adds to the loss on both fused passes, and what it tells about the clean one."""
        losses = Losses({}, {})
        pairs = {"fused": ("rgb", "thermal"), "masked": ("rgb_masked", "thermal_masked")}
        found = [
            self.model.penalty(self.maps[rgb], self.maps[thermal])
            for name, (rgb, thermal) in pairs.items()
            if name in self.maps
        ]
        if penalties := [value for value in found if value is not None]:
            losses.terms["sparsity"] = torch.stack(penalties).sum() / len(self.part.counts)
        if "fused" in self.maps:
            told = self.model.reliance(self.maps["rgb"], self.maps["thermal"])
            losses.details.update({name: self._share * value for name, value in told.items()})
        return losses


def _cut(maps: Maps) -> Maps:
    """The same values, whose gradients stop here and are kept."""
    return [level.detach().requires_grad_(level.requires_grad) for level in maps]


def _descended(losses: Losses, backward: bool) -> Losses:
    """The same losses; with `backward` their gradients are added, and they have none any more."""
    if not backward:
        return losses
    if losses.terms:
        total = losses.total
        with torch.autocast(total.device.type, enabled=False):
            total.backward()
    return Losses({name: value.detach() for name, value in losses.terms.items()}, losses.details)


def _descend_maps(maps: Mapping[str, Maps], cut: Mapping[str, Maps]) -> None:
    """The backward pass from where the gradients were kept."""
    pairs = [pair for name in maps for pair in zip(maps[name], cut[name], strict=True)]
    kept = {level: leaf.grad for level, leaf in pairs if level.requires_grad and leaf.grad is not None}
    if kept:
        with torch.autocast(next(iter(kept)).device.type, enabled=False):
            torch.autograd.backward(list(kept), list(kept.values()))


class _Second(NamedTuple):
    """The masked input."""

    image: Image
    tokens: Hidden | None  # replaced by the mask token
    hidden: Hidden | None  # not there, whatever stands in their place


def _second(image: Image, hidden: Hidden | None, view: View | None, fill: str) -> _Second | None:
    if hidden is None and view is None:
        return None
    seen = image if view is None else view.image
    if hidden is None:
        return _Second(seen, None, None)
    return _Second(*chosen("fill", fill, FILLS)(seen, hidden), hidden)


def _maps(
    model: Segmenter, image: Image, second: _Second | None, needed: Collection[str], together: bool
) -> dict[str, Maps]:
    """Maps of the needed passes; the fusion norms see the clean input, then the masked one."""
    branches: dict[str, Maps] = {}
    for modality in ("rgb", "thermal"):
        clean = modality in needed or "fused" in needed
        masked = f"{modality}_masked" in needed or "masked" in needed
        if clean and masked and together:
            assert second is not None
            tokens = None if second.tokens is None else torch.cat([torch.zeros_like(second.tokens), second.tokens])
            both = model.branch(modality, torch.cat([image, second.image]), tokens)
            halves = [level.chunk(2) for level in both]
            branches[modality], branches[f"{modality}_masked"] = ([half[i] for half in halves] for i in (0, 1))
            continue
        if clean:
            branches[modality] = model.branch(modality, image)
        if masked:
            assert second is not None
            branches[f"{modality}_masked"] = model.branch(modality, second.image, second.tokens)
    if "fused" in needed:
        branches["fused"] = model.fuse(branches["rgb"], branches["thermal"])
    if "masked" in needed:
        assert second is not None
        rgb, thermal = branches["rgb_masked"], branches["thermal_masked"]
        branches["masked"] = model.fuse(rgb, thermal, second.hidden, masked=True)
    return branches


class _Labelled(NamedTuple):
    """Supervised passes with the labels they share."""

    names: list[str]
    targets: Targets
    part: Part


def _by_labels(
    prediction: Prediction, names: list[str], targets: Targets, part: Part, view: View | None
) -> list[tuple[Prediction, _Labelled]]:
    """The supervised passes by the labels they have, those of the clean input first, each with what was predicted."""
    if not names:
        return []
    if view is None:
        return [(prediction, _Labelled(names, targets, part))]
    own = Part(part.first, view.counts or tuple(map(len, view.targets.classes)))
    clean = [name for name in names if name in CLEAN]
    images = len(targets.classes)
    cut, end = len(clean) * images, len(names) * images
    found = []
    if clean:
        found.append((_rows(prediction, slice(0, cut)), _Labelled(clean, targets, part)))
    if masked := names[len(clean) :]:
        found.append((_rows(prediction, slice(cut, end)), _Labelled(masked, view.targets, own)))
    return found


def _rows(prediction: Prediction, rows: slice) -> Prediction:
    return Prediction(prediction.class_logits[:, rows], prediction.mask_logits[:, rows])


def _asked(teacher: Segmenter, image: Image, form: Form) -> Output:
    """What a teacher in evaluation mode says about the clean input."""
    with evaluating(teacher), torch.autocast(image.device.type, enabled=torch.is_autocast_enabled(image.device.type)):
        maps = teacher.fuse(teacher.branch("rgb", image), teacher.branch("thermal", image))
        if form.needs == {"maps"}:
            return Output(maps=maps)
        prediction = teacher.head(maps, deep=False, with_masks=len(image) * ("mask_logits" in form.needs))
        return Output(at_least_float32(prediction.class_logits[-1]), prediction.mask_logits[-1], maps)


def _counted(targets: Targets) -> Counted | None:
    """Tokens that are not padding; None: none is."""
    return targets.labels[:, 1:-1:TOKEN, 1:-1:TOKEN] != PADDED if targets.padded else None


def _supervision(found: SetLosses, names: Sequence[str], loss: config.Loss, factor: Mapping[str, float]) -> Losses:
    """The supervised terms of these passes, summed over the decoder outputs, and their parts."""
    parts = {
        "class": loss.class_weight * found.classes.sum(1),
        "mask": loss.mask_weight * found.masks.sum(1),
        "dice": loss.dice_weight * found.dice.sum(1),
    }
    losses = Losses({}, {})
    for i, name in enumerate(names):
        weighted = {part: factor[name] * getattr(loss, name) * value[i] for part, value in parts.items()}
        losses.terms[name] = torch.stack(list(weighted.values())).sum()
        losses.details.update({f"{name}/{part}": value.detach() for part, value in weighted.items()})
    return losses


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
    table = table.view(rows, most).to(class_logits.device)
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
