"""The training objective: supervised terms of up to six head passes and two self-distillation terms.

b = batch, h w = tokens of stride 4, H W = pixels
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crm import config, paths
from crm.distillation import DISTILLATIONS, Counted, Form, Output, distance, evaluating
from crm.masking import TOKEN
from crm.model.backbone import drawn_for
from crm.model.pixel_decoder import at_least_float32
from crm.model.query_decoder import Prediction
from crm.model.segmenter import Hidden, Image, Maps, Segmenter
from crm.names import chosen
from crm.points import PADDED, PointSource, RandomPoints
from crm.replicas import Replicas, Share
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
        counts = self.counts or tuple(map(len, self.targets.classes))
        return View(self.image[images], self.targets.part(images), counts)


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
            memory for intermediate results; "threaded", with `backward` and `RandomPoints`, is that with a share of the
            images in every thread of PyTorch (crm.replicas), else it is "streamed". Equal to rounding, but for the
            random draws of stochastic depth and points.
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
    second = paths.second_input(image, hidden, view and view.image, fill)
    # before the passes of the step, which move the running statistics
    wanted = _asked(teacher or model, image, form) if distilled and not taught else None
    batched = head_passes == "batched"
    threaded = head_passes == "threaded" and backward and isinstance(points, RandomPoints)
    replicas = Replicas(model, len(image), threaded)
    names = {*needed, *distilled, *taught}

    def branches(share: Share) -> dict[str, Maps]:
        with _draws(share, part):
            own = second and second.part(share.images)
            return paths.branches(share.model, image[share.images], own, names, together=batched or backward)

    grown = replicas.each(branches)
    maps = paths.joined(grown)
    if backward:
        maps = paths.cut(maps)
    maps |= paths.fused(model, maps, second, names)
    passes = _Passes(model, maps, needed, distilled, wanted, targets, loss, points, part, view, factor)
    # supervised ones first where masks are asked of the first ones; else the teacher before its students
    order = sorted(needed, key=lambda name: not needed[name]) if batched else list(needed)
    order += [name for name in (*CLEAN, *MASKED) if name in taught | distilled and name not in needed]

    def head(share: Share) -> tuple[Losses, dict[str, Maps]]:
        own = passes.of(share, cut=backward)
        losses = Losses({}, {})
        with _draws(share, part):
            for group in [order] if batched else [[name] for name in order]:
                losses.add(_descended(own.losses(group), backward))
        return losses, own.maps

    found = replicas.each(head)
    losses = Losses({}, {})
    for of_share, _ in found:
        losses.add(of_share)
    losses.add(_descended(passes.of_fusion(), backward))
    if backward:
        paths.descend(maps, paths.kept([leaves for _, leaves in found]))
        gradients = paths.kept([{name: maps[name] for name in grown[0]}])
        replicas.each(lambda share: paths.descend(grown[share.number], gradients, share.images))
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

    def of(self, share: Share, cut: bool) -> "_Passes":
        """Those of a share.

        Args:
            cut: the gradients stop at its maps and are kept there.
        """
        images, points = share.images, self.points
        if share.draws is not None:
            assert isinstance(points, RandomPoints)  # those of a share are known from the whole batch's
            points = points.copy()
        return replace(
            self,
            model=share.model,
            maps=paths.cut(self.maps, images) if cut else self.maps,
            teacher=self.teacher and self.teacher.part(images),
            targets=self.targets.part(images),
            points=points,
            part=replace(self.part, first=self.part.first + images.start),
            view=self.view and self.view.part(images),
        )

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


def _draws(share: Share, part: Part) -> AbstractContextManager[None]:
    """Inside, random draws per image are those that the share has in a whole batch."""
    images = share.images.stop - share.images.start
    return drawn_for(part.first + share.images.start, images, len(part.counts), share.draws)


def _descended(losses: Losses, backward: bool) -> Losses:
    """The same losses; with `backward` their gradients are added, and they have none any more."""
    if not backward:
        return losses
    if losses.terms:
        total = losses.total
        with torch.autocast(total.device.type, enabled=False):
            total.backward()
    return Losses({name: value.detach() for name, value in losses.terms.items()}, losses.details)


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
