"""Points on which masks are compared: where they lie, and what prediction and labels say there.

r = rows (one per pass, image and decoder output, in this order), n = pairs of a query with its class, p = points,
b = images, h w = label map. A point is (x, y), each from 0 to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Integer, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

MANY = 16  # channels, from which on a map is sampled as a table of its cells, on a CPU
OUTSIDE, IGNORED, PADDED = 253, 254, 255  # ids in `Targets.labels` that are no class


class Plan(NamedTuple):
    """What points are needed for in one call."""

    passes: Sequence[str]  # "fused", "rgb", "thermal", "masked"
    outputs: int  # of the decoder, the last layer last
    pairs: Sequence[int]  # per image
    match: int  # points per image for matching
    candidates: int  # points per pair, of which the most uncertain are kept
    extra: int  # points per pair that are kept anyway
    device: torch.device
    first: int = 0  # place of the first image in the whole batch, where a step is computed in parts
    whole: Sequence[int] = ()  # pairs per image of the whole batch; () is `pairs`

    @property
    def rows(self) -> int:
        return len(self.passes) * len(self.pairs) * self.outputs


@runtime_checkable
class Draw(Protocol):
    """The points of one call; asked for rows, then for pairs, in ascending order."""

    def match(self, rows: slice) -> Float[Tensor, "r p 2"]: ...

    def loss(self, pairs: slice) -> tuple[Float[Tensor, "n p 2"], Float[Tensor, "n e 2"]]:
        """Candidates, and extra points."""
        ...


PointSource = Callable[[Plan], Draw]


@dataclass(frozen=True)
class RandomPoints:
    """Uniform points, drawn for all rows and pairs together.

    For every pass one set is drawn per request and moved, around the borders, by an own random shift for every row or
    pair. Points of a row are independent, and so are those of two rows at the same place in the set; it takes a tenth
    of the time. Shifts are drawn for the whole batch, so that its parts have the points that it would have.
    """

    generator: torch.Generator

    def copy(self) -> "RandomPoints":
        """A source of the same points once more, from where this one is."""
        return RandomPoints(self.generator.clone_state())

    def __call__(self, plan: Plan) -> Draw:
        whole = list(plan.whole or plan.pairs)
        rows = slice(plan.first * plan.outputs, (plan.first + len(plan.pairs)) * plan.outputs)
        before = sum(whole[: plan.first]) * plan.outputs
        pairs = slice(before, before + sum(plan.pairs) * plan.outputs)
        drawn = [
            (
                _Shifted.drawn(self.generator, len(whole) * plan.outputs, rows, plan.match),
                _Shifted.drawn(self.generator, sum(whole) * plan.outputs, pairs, plan.candidates),
                _Shifted.drawn(self.generator, sum(whole) * plan.outputs, pairs, plan.extra),
            )
            for _ in plan.passes
        ]
        return _Random(*(_Shifted.joined(parts, plan.device) for parts in zip(*drawn, strict=True)))


class _Shifted(NamedTuple):
    """Sets of points, and for every line the set it takes and by how much it moves it."""

    sets: Float[Tensor, "s p 2"]
    of: Integer[Tensor, " n"]
    shifts: Float[Tensor, "n 2"]

    @classmethod
    def drawn(cls, generator: torch.Generator, lines: int, kept: slice, points: int) -> "_Shifted":
        """One set, and the shifts of the kept lines among all."""
        numbers = torch.rand(lines + points, 2, generator=generator, device=generator.device)
        shifts = numbers[:lines][kept]
        return cls(numbers[None, lines:], torch.zeros(len(shifts), dtype=torch.long, device=generator.device), shifts)

    @classmethod
    def joined(cls, parts: Sequence["_Shifted"], device: torch.device) -> "_Shifted":
        """The sets and the lines of several, one after another."""
        of = torch.cat([part.of + number for number, part in enumerate(parts)])
        sets, shifts = torch.cat([part.sets for part in parts]), torch.cat([part.shifts for part in parts])
        return cls(sets.to(device), of.to(device), shifts.to(device))

    def points(self, lines: slice) -> Float[Tensor, "n p 2"]:
        return self.sets.index_select(0, self.of[lines]).add_(self.shifts[lines, None]).frac_()


@dataclass(frozen=True)
class _Random:
    matching: _Shifted
    candidates: _Shifted
    extra: _Shifted

    def match(self, rows: slice) -> Float[Tensor, "r p 2"]:
        return self.matching.points(rows)

    def loss(self, pairs: slice) -> tuple[Float[Tensor, "n p 2"], Float[Tensor, "n e 2"]]:
        return self.candidates.points(pairs), self.extra.points(pairs)


@dataclass(frozen=True)
class ReleasedPoints:
    """Uniform points in the order of the released code, for bit parity; all drawn at once, so it needs much memory.

    For every pass the last decoder output first, then the others from the first on: one draw per image for matching,
    one for the candidates of all pairs, one for the extra points.
    """

    generator: torch.Generator

    def __call__(self, plan: Plan) -> Draw:
        def uniform(rows: int, points: int) -> Tensor:
            return torch.rand(rows, points, 2, generator=self.generator, device=self.generator.device).to(plan.device)

        match, candidates, extra = {}, {}, {}
        for name in plan.passes:
            for output in (plan.outputs - 1, *range(plan.outputs - 1)):
                match[name, output] = torch.cat([uniform(1, plan.match) for _ in plan.pairs])
                candidates[name, output] = uniform(sum(plan.pairs), plan.candidates)
                extra[name, output] = uniform(sum(plan.pairs), plan.extra)
        return GivenPoints(match, candidates, extra)(plan)


@dataclass(frozen=True)
class GivenPoints:
    """Points that are known; keys are (pass, decoder output).

    Args:
        match: image by image (b p 2).
        candidates: pair by pair (n p 2): image by image, inside an image by query.
        extra: like candidates.
    """

    match: dict[tuple[str, int], Tensor]
    candidates: dict[tuple[str, int], Tensor]
    extra: dict[tuple[str, int], Tensor]

    def __call__(self, plan: Plan) -> Draw:
        one = [1] * len(plan.pairs)
        return Points(
            _in_row_order(plan, self.match, one),
            _in_row_order(plan, self.candidates, plan.pairs),
            _in_row_order(plan, self.extra, plan.pairs),
        )


def _in_row_order(plan: Plan, blocks: dict[tuple[str, int], Tensor], sizes: Sequence[int]) -> Tensor:
    """Blocks per pass and decoder output, each image by image, as one tensor: pass, image, decoder output."""
    parts = []
    for name in plan.passes:
        outputs = [blocks[name, output].split(list(sizes)) for output in range(plan.outputs)]
        parts += [part for image in zip(*outputs, strict=True) for part in image]
    return torch.cat(parts).to(plan.device)


@dataclass(frozen=True)
class Points:
    """A draw that is there as a whole, in the order of rows and of pairs."""

    matching: Float[Tensor, "r m 2"]
    candidates: Float[Tensor, "n p 2"]
    extra: Float[Tensor, "n e 2"]

    def match(self, rows: slice) -> Float[Tensor, "r p 2"]:
        return self.matching[rows]

    def loss(self, pairs: slice) -> tuple[Float[Tensor, "n p 2"], Float[Tensor, "n e 2"]]:
        return self.candidates[pairs], self.extra[pairs]


def sample_maps(maps: Float[Tensor, "n c mh mw"], points: Float[Tensor, "n p 2"]) -> Float[Tensor, "n c p"]:
    """Values of `maps` at the points: bilinear between cell centres, with zeros beyond the border."""
    if maps.device.type != "cpu" or maps.shape[1] < MANY or maps.requires_grad:
        return F.grid_sample(maps, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]
    n, channels, height, width = maps.shape
    rows, shares = _corners(torch.arange(n), points, height + 2, width + 2)
    cells = F.pad(maps, (1, 1, 1, 1)).flatten(2)
    table, bags, weights = (one.mT.contiguous().flatten(0, 1) for one in (cells, rows, shares))
    return F.embedding_bag(bags, table, mode="sum", per_sample_weights=weights).view(n, -1, channels).mT


def _corners(
    images: Integer[Tensor, " n"], points: Float[Tensor, "n p 2"], height: int, width: int
) -> tuple[Integer[Tensor, "n 4 p"], Float[Tensor, "n 4 p"]]:
    """The four cells around each point, counted through all maps, and their bilinear shares.

    Args:
        height, width: of a map with its border of one cell; without it the points go from 0 to 1.
    """
    sides = width - 2, height - 2
    x, y = (at * side + 0.5 for at, side in zip(points.unbind(2), sides, strict=True))  # 0.5: the border cell's centre
    left, top = x.floor(), y.floor()
    first = top.long() * width + left.long() + (images * (height * width))[:, None]
    x, y = x - left, y - top
    right = x * y
    shares = torch.stack([1 - x - y + right, x - right, y - right, right], dim=1)
    return torch.stack([first, first + 1, first + width, first + width + 1], dim=1).int(), shares


class Corners(NamedTuple):
    """The four label pixels around each point, and their bilinear shares."""

    ids: UInt8[Tensor, "n 4 p"]
    shares: Float[Tensor, "n 4 p"]


def label_corners(
    labels: UInt8[Tensor, "b h w"], images: Integer[Tensor, " n"], points: Float[Tensor, "n p 2"]
) -> Corners:
    """Reads label maps that have a border of one pixel (`Targets.labels`), one map per row of points.

    Equals sampling a mask per class, without making the masks.
    """
    height, width = labels.shape[1:]
    index, shares = _corners(images, points, height, width)
    return Corners(labels.flatten().index_select(0, index.flatten()).view_as(index), shares)


def class_shares(corners: Corners, classes: Shaped[Tensor, "n t"]) -> Float[Tensor, "n t p"]:
    """How much of each class a point sees: the bilinear samples of the classes' masks."""
    ids, shares = corners
    classes = classes.to(ids.dtype)[:, :, None]
    total = shares[:, None, 0] * (ids[:, None, 0] == classes)
    for corner in range(1, 4):
        total = total + shares[:, None, corner] * (ids[:, None, corner] == classes)
    return total


def point_weights(corners: Corners, skip: Sequence[int]) -> Float[Tensor, "n p"]:
    """The share of what a point sees that is none of the ids in `skip`."""
    ids, shares = corners
    skipped = torch.zeros_like(ids, dtype=torch.bool)
    for code in skip:
        skipped = skipped | (ids == code)
    return (shares * ~skipped).sum(1)
