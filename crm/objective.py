"""The training objective: supervised terms of up to six head passes and two self-distillation terms.

b = batch, h w = tokens of stride 4, H W = pixels
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crm import config
from crm.distillation import DISTILLATIONS, Counted, Form, Output, distance, evaluating
from crm.masking import FILLS, TOKEN
from crm.model.backbone import drawn_for
from crm.model.pixel_decoder import at_least_float32
from crm.model.query_decoder import Prediction
from crm.model.segmenter import Hidden, Image, Maps, Segmenter
from crm.names import chosen
from crm.points import PADDED, PointSource
from crm.set_losses import SetLosses, set_losses
from crm.targets import Part, Targets

CLEAN = ("fused", "rgb", "thermal")  # passes on the clean input; also names of weights in config.Loss, as the next
MASKED = ("masked", "rgb_masked", "thermal_masked")  # the same three on the masked input
STUDENTS = {"complementary": ("masked",), "non_local": ("rgb_masked", "thermal_masked")}  # of the distilled terms


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
