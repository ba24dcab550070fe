"""Procedural RGB-thermal road scenes: the data set that needs no files.

A scene is a function of (seed, split, index); its layout does not know the picture's size, so one scene can be had
small for training and large for looking at. RGB carries colour and texture and fails at night and in glare; thermal
carries temperature and fails at thermal crossover, when things are as warm as what surrounds them. Cars and people
show in both. Cones are plastic at the temperature of the air and show in RGB only; vents are hot and painted like
what they lie in, so they show in thermal only.

Everything is exact arithmetic (+ - * / floor, integers from numpy's PCG64), without sin, exp or normal deviates, whose
last bits depend on the processor. Edges are smoothed by analytic coverage instead of supersampling, which costs less.

The camera looks along a straight or bending road. x to the right and y down are shares of width and height; d = y minus
the horizon is a point's "nearness" on flat ground: metres become pixels in proportion to d.
"""

import math
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import overload

import numpy as np

from crm.data.frames import Frame

VERSION = 1  # raised whenever a pixel of any scene changes; part of the data manifest
SMALLEST = (48, 64)  # height, width below which objects would vanish

TROUBLES = (
    "",
    "crossover",
    "glare",
    "",
    "crossover",
)  # of day scenes, in turn, so that every few frames hold all of them

BACKGROUND, ROAD, CAR, PERSON, CONE, VENT = range(6)

EYE = 1.4  # height of the camera above the road, metres
FOCAL = 1.2  # focal length in picture heights: distance in metres = EYE * FOCAL / d
ACROSS = 0.75 / EYE  # picture widths per metre and d, at the 4:3 the scenes are composed for

RATE = 20  # frames a second, if a scene were a recording
SPEED, WALK = 10.0, 1.4  # of the camera, and of people across its way, metres a second
APPROACH = {"car": 0.0, "oncoming": 2.0}  # how fast things come nearer, of SPEED; what is not here stands still: 1

SEEN, ALL = slice(0, 6), slice(0, 7)  # layers: albedo R G B, emitted light R G B, temperature

Colour = tuple[float, float, float]
Point = tuple[float, float]
Shape = tuple[tuple[slice, slice], np.ndarray] | None  # where on the canvas, and how much of each pixel is covered


def scene(seed: int, split: str, index: int, size: tuple[int, int], before: int = 0) -> Frame:
    """Scene `index` of a split, rendered at `size` (height, width); even indices are day, odd ones night.

    With `before`, as it was so many frames earlier.
    """
    height, width = size
    if height < SMALLEST[0] or width < SMALLEST[1]:
        raise ValueError(f"a synthetic scene needs at least {SMALLEST[0]}x{SMALLEST[1]} pixels, not {height}x{width}")
    plan = earlier(compose(seed, split, index), before) if before else compose(seed, split, index)
    rgb, heat, label = render(plan, height, width)
    sensor = _rng(seed, split, index, 1 + before)  # of its own, so that the layout does not depend on the size
    return Frame(
        name=name(split, index),
        rgb=_expose(rgb, plan, sensor),
        thermal=_sense(heat, plan, sensor),
        label=label,
        night=plan.night,
    )


def name(split: str, index: int) -> str:
    """A frame's name, which like MF's ends in D by day and in N at night."""
    return f"{split}_{index:05d}{'N' if index % 2 else 'D'}"


def compose(seed: int, split: str, index: int) -> "Plan":
    """What stands where in scene `index`, before it has pixels."""
    if index < 0:
        raise ValueError(f"scenes are numbered from 0, not {index}")
    night = index % 2 == 1
    trouble = "" if night else TROUBLES[index // 2 % len(TROUBLES)]
    return _plan(_rng(seed, split, index, 0), night, trouble)


def earlier(plan: "Plan", frames: int) -> "Plan":
    """A scene some frames before, for a camera that drives along the road: what stands on the ground is farther away.

    Houses, sky and the bend stay as they are.
    """
    driven = SPEED * frames / RATE

    def moved(thing: Thing) -> Thing:
        away = EYE * FOCAL / thing.d + driven * APPROACH.get(thing.kind, 1.0)
        walked = WALK * frames / RATE if thing.kind == "person" else 0.0
        return replace(thing, d=EYE * FOCAL / away, lat=thing.lat + math.copysign(walked, thing.traits[0] - 0.5))

    return replace(
        plan,
        zebra=plan.zebra and EYE * FOCAL / (EYE * FOCAL / plan.zebra + driven),
        things=tuple(sorted(map(moved, plan.things), key=lambda thing: thing.d)),
        vents=tuple(map(moved, plan.vents)),
    )


def _rng(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    number = int.from_bytes(sha256(split.encode()).digest()[:4], "little")
    return np.random.default_rng([seed, number, index, purpose])


# What is where -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """Something that stands on the ground."""

    kind: str
    lat: float  # metres to the right of the camera
    d: float  # nearness of its foot
    traits: tuple[float, ...]  # twelve draws from 0..1 for looks


@dataclass(frozen=True)
class Plan:
    """A scene before it has pixels."""

    night: bool
    glare: bool  # day: a low sun near the vanishing point blinds the RGB camera
    crossover: bool  # day: people and cars are about as warm as the street
    horizon: float  # y
    vanishing: float  # x
    bend: float  # how far the road's far end swings sideways, picture widths
    road: tuple[float, float]  # kerbs, metres right of the camera
    walls: tuple[float, float]  # fronts of the houses, metres right of the camera
    lanes: tuple[float, ...]  # painted lines, metres right of the camera
    zebra: float  # nearness of a crossing's near edge, 0 is none
    looks: tuple[float, ...]  # 40 draws from 0..1
    houses: np.ndarray  # (2, 16, 8) draws from 0..1: side, house, traits
    clouds: np.ndarray  # (7, 9) draws
    grain: np.ndarray  # (48, 64) draws, texture of the ground
    stars: np.ndarray  # (60, 3): x, y, brightness
    things: tuple[Thing, ...]  # far to near
    vents: tuple[Thing, ...]


def _plan(rng: np.random.Generator, night: bool, trouble: str) -> Plan:
    between = rng.uniform
    looks = tuple(rng.random(40).tolist())
    horizon, vanishing = between(0.32, 0.44), between(0.34, 0.66)
    side = 1.0 if rng.random() < 0.5 else -1.0  # the side traffic keeps to
    own, other = between(1.7, 2.1) + 2.1 * (rng.random() < 0.6), between(5.0, 5.7) + 2.1 * (rng.random() < 0.6)
    road = (-other, own) if side > 0 else (-own, other)
    walls = (road[0] - between(1.8, 4.5), road[1] + between(1.8, 4.5))
    street = _Street(rng, vanishing)
    add, somewhere = street.add, street.somewhere
    first = rng.random()
    if first < 0.7:
        add("car", between(-0.5, 0.5), between(0.16, 0.34), 1.0)
    if first > 0.3:
        add("oncoming", -side * between(3.2, 3.8), between(0.09, 0.24), 1.0)
    for kerb in road:
        for _ in range(2):
            if rng.random() < 0.6:
                add("parked", kerb - math.copysign(1.1, kerb), between(0.1, 0.3), 1.0)
    for _ in range(1 + int(rng.integers(3))):
        somewhere("person", 0.18, 0.36, 0.4)
    if rng.random() < 0.4:
        somewhere("person", 0.12, 0.2, 0.4)
    if rng.random() < 0.85:
        for _ in range(2 + int(rng.integers(3))):
            d = between(0.2, 0.48)
            add("cone", between(max(road[0], -2.6), min(road[1], 2.6)), d, 0.3)
    for wall, kerb in zip(walls, road, strict=True):
        for _ in range(3):
            kind = ("lamp", "tree", "tree", "sign")[int(rng.integers(4))]
            add(kind, kerb + (wall - kerb) * between(0.25, 0.7), between(0.06, 0.26), 0.0)
    if rng.random() < 0.85:
        for _ in range(6):
            street.vent(between(0.2, 0.4), between(0.1, 0.9), road)
    return Plan(
        night=night,
        glare=trouble == "glare",
        crossover=trouble == "crossover",
        horizon=horizon,
        vanishing=vanishing,
        bend=between(-0.22, 0.22) * (rng.random() < 0.6),
        road=road,
        walls=walls,
        lanes=(-side * 1.75, road[0] + 0.25, road[1] - 0.25),
        zebra=between(0.12, 0.3) if rng.random() < 0.3 else 0.0,
        looks=looks,
        houses=rng.random((2, 16, 8), dtype=np.float32),
        clouds=rng.random((7, 9), dtype=np.float32),
        grain=rng.random((48, 64), dtype=np.float32),
        stars=rng.random((60, 3), dtype=np.float32),
        things=tuple(sorted(street.things, key=lambda thing: thing.d)),
        vents=tuple(street.vents),
    )


class _Street:
    """Where things may still be put."""

    def __init__(self, rng: np.random.Generator, vanishing: float) -> None:
        self.rng, self.vanishing = rng, vanishing
        self.things: list[Thing] = []
        self.vents: list[Thing] = []
        self.taken: list[tuple[float, float, float]] = []  # x, half width and d of what must stay recognisable

    def add(self, kind: str, lat: float, d: float, half: float) -> bool:
        """Puts it there unless it would hide, or be hidden by, too much of something else; half width in metres."""
        traits = tuple(self.rng.random(12).tolist())
        x, reach = self.vanishing + ACROSS * d * lat, ACROSS * d * half
        if half:  # 0 is for what stands beside the road, where crowding does no harm
            if not 0.02 <= x <= 0.98 or any(abs(x - x2) < 0.8 * max(reach, r2) for x2, r2, _ in self.taken):
                return False
            self.taken.append((x, reach, d))
        self.things.append(Thing(kind, lat, d, traits))
        return True

    def somewhere(self, kind: str, low: float, high: float, half: float) -> None:
        """Puts it at a nearness of low to high, in one of five places tried."""
        for _ in range(5):
            d = self.rng.uniform(low, high)
            if self.add(kind, (self.rng.uniform(0.06, 0.94) - self.vanishing) / (ACROSS * d), d, half):
                return

    def vent(self, d: float, x: float, road: tuple[float, float]) -> None:
        """Puts a vent there if that is road, nothing hides it, and there are not two already."""
        traits = tuple(self.rng.random(12).tolist())
        lat, reach = (x - self.vanishing) / (ACROSS * d), ACROSS * d * 0.5
        free = all(abs(x - x2) > reach + r2 or d > d2 + 0.06 for x2, r2, d2 in self.taken)
        if free and len(self.vents) < 2 and road[0] + 0.7 < lat < road[1] - 0.7:
            self.vents.append(Thing("vent", lat, d, traits))
            self.taken.append((x, reach, d))


# How it looks --------------------------------------------------------------------------------------------------------


def render(plan: Plan, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Light (3, h, w) before the camera, temperature (h, w), both about 0..1, and labels (h, w)."""
    canvas = _Canvas(height, width, plan)
    canvas.sky()
    canvas.skyline()
    canvas.houses()
    canvas.ground()
    for vent in plan.vents:
        canvas.vent(vent)
    for thing in plan.things:
        draw, label = DRAW[thing.kind]
        spot = _Spot(canvas, thing)
        draw(spot, thing.traits)
        spot.settle(label, SEEN if thing.kind == "cone" else ALL)
    light = canvas.light()
    rgb = canvas.layers[0:3] * light + canvas.layers[3:6]
    for x, y, radius, colour in canvas.halos:  # bloom in the lens: nothing hides it
        fall = radius * radius / (radius * radius + (canvas.x - x) ** 2 * 1.78 + (canvas.y - y) ** 2)
        rgb += np.array(colour, np.float32).reshape(3, 1, 1) * (fall * fall)
    if plan.glare:  # a low sun blinds the camera: a veil over everything, white round the sun
        sun = plan.vanishing + 0.3 * (plan.looks[15] - 0.5)
        away = (canvas.x - np.float32(sun)) ** 2 * 1.78 + (canvas.y - np.float32(plan.horizon - 0.08)) ** 2
        fall = np.float32(0.05) / (np.float32(0.05) + away)
        rgb += np.array((1.5, 1.3, 1.0), np.float32).reshape(3, 1, 1) * (fall * fall)
        rgb += np.float32(0.16)
    return rgb, canvas.layers[6], canvas.label


def _expose(rgb: np.ndarray, plan: Plan, rng: np.random.Generator) -> np.ndarray:
    """What the RGB camera records, uint8 (h, w, 3): a soft shoulder, then noise, more of it at night."""
    rgb = np.maximum(rgb, 0)
    rgb = np.where(
        rgb > 0.75, 1 - 0.0625 / np.maximum(rgb - 0.5, 0.25), rgb
    )  # meets the line at 0.75 with slope 1, reaches 1 never
    noise = _deviates(rng, rgb.shape) * np.float32(4.5 if plan.night else 2.5)
    return np.clip(rgb * 255 + noise + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def _sense(heat: np.ndarray, plan: Plan, rng: np.random.Generator) -> np.ndarray:
    """What the thermal camera records, uint8 (h, w): blurred by its lens, with noise and faint stripes."""
    for _ in range(max(1, round(heat.shape[0] / 100))):
        heat = _blur(_blur(heat, 0), 1)
    gain, offset = 0.92 + 0.16 * plan.looks[0], 0.05 * plan.looks[1]
    noise = _deviates(rng, heat.shape) * np.float32(3.0) + _deviates(rng, (1, heat.shape[1])) * np.float32(1.2)
    return np.clip((heat * np.float32(gain) + np.float32(offset)) * 255 + noise + 0.5, 0, 255).astype(np.uint8)


def _deviates(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """About normal, deviation 1, exact on every machine: three uniform bytes added."""
    drawn = rng.integers(0, 256, size=(3, *shape), dtype=np.uint8)
    return (drawn[0].astype(np.float32) + drawn[1] + drawn[2] - 382.5) / np.float32(128.0)


def _blur(image: np.ndarray, axis: int) -> np.ndarray:
    """Binomial 1 4 1 along an axis, edges repeated."""
    padded = np.pad(image, [(1, 1) if i == axis else (0, 0) for i in range(2)], mode="edge")
    before, after = (padded[:-2], padded[2:]) if axis == 0 else (padded[:, :-2], padded[:, 2:])
    return (before + after + 4 * image) / np.float32(6)


def _smooth(draws: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Value noise: a coarse grid of draws, interpolated at x (1, w) and y (h, 1) of 0..1."""
    return _between_draws(_between_draws(draws, y).T, x).T


def _between_draws(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of `values` interpolated at places of 0..1."""
    at = np.minimum(np.maximum(at.ravel(), 0), 1) * (len(values) - 1.001)
    low = at.astype(np.int64)
    share = (at - low).astype(np.float32)[:, None]
    share = share * share * (3 - 2 * share)
    return values[low] * (1 - share) + values[low + 1] * share


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share


def _times(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


DARK: Colour = (0.0, 0.0, 0.0)
PAINTS: tuple[Colour, ...] = (
    (0.72, 0.10, 0.10),
    (0.12, 0.25, 0.62),
    (0.88, 0.88, 0.88),
    (0.14, 0.15, 0.17),
    (0.55, 0.58, 0.62),
    (0.10, 0.42, 0.30),
    (0.90, 0.72, 0.14),
    (0.30, 0.52, 0.72),
)
CLOTHES: tuple[Colour, ...] = (
    (0.78, 0.16, 0.22),
    (0.16, 0.28, 0.66),
    (0.92, 0.82, 0.24),
    (0.90, 0.90, 0.92),
    (0.16, 0.52, 0.34),
    (0.58, 0.22, 0.56),
    (0.14, 0.14, 0.18),
    (0.20, 0.62, 0.74),
)
WALLS: tuple[Colour, ...] = (
    (0.66, 0.50, 0.40),
    (0.74, 0.68, 0.58),
    (0.54, 0.30, 0.24),
    (0.60, 0.62, 0.66),
    (0.82, 0.74, 0.54),
    (0.48, 0.54, 0.60),
    (0.70, 0.58, 0.54),
    (0.56, 0.50, 0.42),
)
SKINS: tuple[Colour, ...] = ((0.86, 0.68, 0.56), (0.68, 0.48, 0.36), (0.42, 0.28, 0.20), (0.78, 0.58, 0.44))
HAIR: tuple[Colour, ...] = ((0.08, 0.06, 0.05), (0.30, 0.20, 0.12), (0.55, 0.45, 0.30), (0.35, 0.35, 0.35))
TROUSERS: tuple[Colour, ...] = ((0.15, 0.17, 0.30), (0.12, 0.12, 0.13), (0.40, 0.34, 0.26), (0.28, 0.30, 0.34))
SIGNS: tuple[Colour, ...] = ((0.75, 0.08, 0.10), (0.10, 0.25, 0.65), (0.90, 0.70, 0.10))
CROWN = (  # of a tree: x in metres, y as a share of its height, radius in metres, brightness
    (-0.6, 0.62, 0.8, 0.72),
    (0.62, 0.60, 0.78, 0.78),
    (0.0, 0.72, 1.05, 0.9),
    (-0.25, 0.86, 0.75, 1.08),
    (0.35, 0.80, 0.6, 1.2),
)


def _pick(options: tuple[Colour, ...], draw: float) -> Colour:
    return options[int(draw * len(options))]


class _Canvas:
    """The picture in the making: seven layers, labels, and shapes with exact edges."""

    def __init__(self, height: int, width: int, plan: Plan) -> None:
        self.height, self.width, self.plan = height, width, plan
        self.layers = np.zeros((7, height, width), np.float32)
        self.label = np.zeros((height, width), np.uint8)
        self.px = np.arange(width, dtype=np.float32) + np.float32(0.5)
        self.py = np.arange(height, dtype=np.float32) + np.float32(0.5)
        self.x, self.y = (self.px / np.float32(width))[None, :], (self.py / np.float32(height))[:, None]
        self.halos: list[tuple[float, float, float, Colour]] = []
        self.lamps: list[tuple[float, float, float]] = []
        night, warm = plan.night, plan.looks[2]
        self.air = 0.30 + 0.04 * warm if night else 0.40 + 0.06 * warm  # temperature of what nothing heats
        self.asphalt = self.air + (0.07 if night else 0.1)
        if plan.crossover:
            self.asphalt = self.air + 0.02

    def warm(self, degrees: float) -> float:
        """A thing's temperature above the air's, as the scene has it: crossover leaves hardly any of it."""
        return self.asphalt + 0.15 * degrees if self.plan.crossover else self.air + degrees

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, soft: float = 0.0) -> Shape:
        """`soft` above 0 fades from the middle to the rim."""
        left, right = max(0, math.floor(cx - rx - 0.5)), min(self.width, math.ceil(cx + rx + 0.5))
        top, bottom = max(0, math.floor(cy - ry - 0.5)), min(self.height, math.ceil(cy + ry + 0.5))
        if left >= right or top >= bottom:
            return None
        across = (self.px[left:right] - np.float32(cx)) / np.float32(rx)
        down = (self.py[top:bottom] - np.float32(cy)) / np.float32(ry)
        radius = np.sqrt(across * across + (down * down)[:, None])
        sharp = np.float32(1 / soft if soft else min(rx, ry))
        cover = (1 - radius) * sharp + np.float32(0 if soft else 0.5)
        return (slice(top, bottom), slice(left, right)), np.minimum(np.maximum(cover, 0), 1)

    def warmer(self, shape: Shape, heat: float) -> None:
        """Gives what lies there a temperature, in the thermal picture only."""
        if shape is not None:
            where, cover = shape
            under = self.layers[(6, *where)]
            under += (np.float32(heat) - under) * cover

    def shade(self, shape: Shape, factor: float, warmth: float = 0.0) -> None:
        """Darkens what RGB sees there and warms the ground by `warmth`."""
        if shape is not None:
            where, cover = shape
            self.layers[(slice(0, 3), *where)] *= 1 - cover * np.float32(1 - factor)
            self.layers[(6, *where)] += cover * np.float32(warmth)

    # what is far away

    def sky(self) -> None:
        plan, layers = self.plan, self.layers
        up = np.clip(1 - self.y / np.float32(plan.horizon), 0, 1)  # 0 at the horizon
        hour = plan.looks[3]
        if plan.night:
            top, low = (0.010, 0.014, 0.035), _mix((0.05, 0.05, 0.09), (0.14, 0.09, 0.07), hour)
        elif plan.glare:
            top, low = (0.50, 0.62, 0.80), (1.0, 0.84, 0.62)
        else:
            top, low = _mix((0.24, 0.46, 0.82), (0.52, 0.58, 0.66), hour * hour), (0.80, 0.87, 0.94)
        cloud = np.clip((_smooth(plan.clouds, self.x, self.y / np.float32(plan.horizon)) - 0.45) * 2.6, 0, 1)
        cloud *= np.minimum(up * 6, 1) * np.float32(0.35 + 0.65 * plan.looks[4])
        white = (0.05, 0.05, 0.07) if plan.night else (0.96, 0.96, 0.97)
        for channel in range(3):  # the sky shines by itself
            clear = np.float32(low[channel]) + np.float32(top[channel] - low[channel]) * np.minimum(up * 1.3, 1)
            layers[3 + channel] = clear + (np.float32(white[channel]) - clear) * cloud
        cold = 0.05 if plan.night else 0.09
        layers[6] = np.float32(cold) + (1 - up) * (1 - up) * np.float32(0.12) + cloud * np.float32(0.07)
        if plan.night:
            keep = plan.stars[plan.stars[:, 2] > 0.3]
            column, row = (keep[:, 0] * self.width).astype(int), (keep[:, 1] * plan.horizon * self.height).astype(int)
            layers[3:6, row, column] += (
                keep[:, 2] * np.float32(min(1.0, self.height / 240)) * 0.7 * (1 - cloud[row, column])
            )
            if plan.looks[5] < 0.5:
                x, y, r = 0.1 + 0.8 * plan.looks[6], 0.04 + 0.12 * plan.looks[7], 0.022
                moon = self.ellipse(x * self.width, y * self.height, 0.75 * r * self.width, r * self.height)
                if moon is not None:
                    layers[(slice(3, 6), *moon[0])] += np.float32(0.8) * moon[1]
                self.halos.append((x, y, 0.05, (0.12, 0.12, 0.14)))

    def skyline(self) -> None:
        """Hills, trees and far houses along the horizon."""
        plan, rows = self.plan, self.plan.grain
        hills = _smooth(rows[:2, :14], self.x, np.zeros((1, 1), np.float32))[0] * np.float32(0.10) + np.float32(0.01)
        towers = rows[3][np.minimum(self.x[0] * 22, 21).astype(int)] * np.float32(0.17) - np.float32(0.055)
        haze: Colour = (0.60, 0.66, 0.74)
        hill = _mix((0.30, 0.42, 0.30), haze, 0.45)
        far = _mix((0.46, 0.45, 0.48), haze, 0.5)
        for top, colour, heat in ((towers, far, self.air - 0.03), (hills, hill, self.air - 0.08)):
            cover = np.clip((self.y - np.float32(plan.horizon) + top) * self.height + 0.5, 0, 1)
            ink = np.array((*colour, 0, 0, 0, heat), np.float32)[:, None, None]
            self.layers += (ink - self.layers) * cover

    def houses(self) -> None:
        """Fronts on both sides, in perspective: a column of pixels is one distance along the wall."""
        plan, horizon = self.plan, np.float32(self.plan.horizon)
        for side in range(2):
            edge = plan.vanishing * self.width
            columns = slice(0, int(edge)) if side == 0 else slice(int(edge) + 1, self.width)
            d = np.abs(self.x[0, columns] - np.float32(plan.vanishing)) / np.float32(ACROSS * abs(plan.walls[side]))
            d = np.maximum(d, np.float32(1e-3))
            far = np.float32(EYE * FOCAL) / d
            table = plan.houses[side]
            ends = np.cumsum(7 + 9 * table[:, 0].astype(np.float64)).astype(np.float32)
            house = np.minimum(np.searchsorted(ends, far), 15)
            tall = np.where(
                (table[:, 1] < 0.2) | (np.arange(16) > 11), np.float32(0), 3.5 + 8 * table[:, 2] * table[:, 2]
            )
            rise = np.float32(EYE) * (1 - (self.y - horizon) / d)  # metres above the ground
            scale = d * np.float32(self.height / EYE)  # pixels per metre
            cover = np.clip((tall[house] - rise) * scale + np.float32(0.5), 0, 1)
            cover *= self.y < horizon + d
            sunny = 1.0 if (plan.looks[8] < 0.5) == (side == 0) else 0.62
            paint = np.array([_pick(WALLS, float(t)) for t in table[:, 3]], np.float32)[house].T
            haze = np.clip(far / 110, 0, 0.6)
            bay, floor = far / np.float32(2.6), rise / np.float32(2.9)
            bay, floor = bay - np.float32(0.35), floor - np.float32(0.1)
            across, up = bay - np.floor(bay), floor - np.floor(floor)
            window = (np.abs(across - 0.5) < 0.27) & (np.abs(up - 0.55) < 0.26)
            window = window * np.clip(scale / 4, 0, 1) * (rise < tall[house] - 0.4)
            number = (bay.astype(int) * 7 + floor.astype(int) * 13 + house * 5) % 97
            lit = plan.grain.ravel()[number] < (0.26 if plan.night else 0.0)
            ground_floor = np.clip(1 - np.abs(rise - 2.75) * scale / 2, 0, 1) * (table[house, 4] < 0.6)  # a cornice
            view = self.layers[:, :, columns]
            for channel in range(3):
                wall = paint[channel] * np.float32(sunny) * (0.92 + 0.08 * np.minimum(rise, 3) / 3)
                wall = wall * (1 - 0.35 * ground_floor)
                glass = np.float32((0.20, 0.25, 0.32)[channel])
                colour = wall + (glass - wall) * window
                colour = colour + (np.float32((0.66, 0.72, 0.80)[channel]) - colour) * haze
                view[channel] += (colour - view[channel]) * cover
                shine = lit * window * np.float32((0.62, 0.46, 0.22)[channel])
                view[3 + channel] += (shine - view[3 + channel]) * cover
            facade = self.air - 0.05 + 0.08 * table[house, 5] + (0.05 if not plan.night and sunny == 1 else 0.0)
            heat = facade + window * np.where(lit | (plan.night & (number % 4 == 0)), 0.14, -0.07)
            view[6] += (heat.astype(np.float32) - view[6]) * cover

    # the ground

    def ground(self) -> None:
        """Grass or paving, pavements, the road, its wheel tracks, lines and crossing."""
        plan, air = self.plan, self.air
        ground = _Ground(self)
        lay, band, lat, far = ground.lay, ground.band, ground.lat, ground.far
        grass = plan.looks[9] < 0.5
        soil: Colour = (0.34, 0.46, 0.24) if grass else (0.56, 0.52, 0.46)
        lay(np.ones((1, 1), np.float32), soil, air - (0.05 if grass else 0.01), 0.4)
        left, right = plan.road
        pavement = _mix((0.60, 0.58, 0.55), (0.52, 0.48, 0.46), plan.looks[10])
        lay(band(left - 1.8, right + 1.8), pavement, air + 0.03, 0.15)
        lay(band(left - 0.18, right + 0.18), _times(pavement, 1.2), air + 0.04, 0.1)
        tone = 0.25 + 0.11 * plan.looks[11]
        tarmac = band(left, right)
        lay(tarmac, (tone, tone, tone * 1.05), self.asphalt, 0.3)
        ground.label[(tarmac * ground.fade) > 0.5] = ROAD
        track = np.clip(1 - np.abs(np.abs(lat) - 0.8) / 0.5, 0, 1) * tarmac  # where wheels run: darker, warmer
        ground.view[0:3] *= 1 - np.float32(0.06) * track
        ground.view[6] += track * np.float32(0.025)
        paint: Colour = (0.86, 0.86, 0.82)
        for number, line in enumerate(plan.lanes):
            cover = np.minimum(band(line - 0.09, line + 0.09), ground.scale * np.float32(0.18)) * tarmac
            if number == 0:
                dash = far / np.float32(6) + np.float32(plan.looks[12])
                cover = cover * ((dash - np.floor(dash)) < 0.55)
            lay(cover * np.float32(0.85), paint, self.asphalt - 0.02, 0.2)
        if plan.zebra:
            begin = EYE * FOCAL / plan.zebra
            stripe = lat - np.float32(left)
            depth = np.clip(np.minimum(far - np.float32(begin), np.float32(begin + 3) - far) * 8, 0, 1)
            bars = np.clip((np.float32(0.26) - np.abs(stripe - np.floor(stripe) - 0.5)) * ground.scale + 0.5, 0, 1)
            cover = depth * bars * band(left + 0.4, right - 0.4) * np.float32(0.85)
            lay(cover, paint, self.asphalt - 0.02, 0.2)

    @overload
    def centre(self, d: float) -> float: ...
    @overload
    def centre(self, d: np.ndarray) -> np.ndarray: ...
    def centre(self, d):
        """x of the camera's line on the ground at nearness d."""
        away = np.maximum(1 - d / np.float32(0.3), 0) if isinstance(d, np.ndarray) else max(1 - d / 0.3, 0.0)
        return self.plan.vanishing + self.plan.bend * away * away

    def vent(self, vent: Thing) -> None:
        """A steaming manhole in the ground: hot, and in RGB nothing but ground."""
        d = vent.d
        near, far = d / (1 - d * 0.6 / (EYE * FOCAL)), d / (1 + d * 0.6 / (EYE * FOCAL))
        cx, cy = self.centre(d) + ACROSS * d * vent.lat, self.plan.horizon + (near + far) / 2
        radius = 0.6 * ACROSS * d * self.width
        shape = self.ellipse(cx * self.width, cy * self.height, radius, (near - far) / 2 * self.height)
        halo = self.ellipse(cx * self.width, cy * self.height, radius * 1.7, (near - far) * self.height, soft=1.0)
        self.shade(halo, 1.0, 0.08)
        self.warmer(shape, 0.86 + 0.1 * vent.traits[0])
        if shape is not None:
            self.label[shape[0]][shape[1] > 0.5] = VENT

    # what lights it

    def light(self) -> np.ndarray:
        """Light on every pixel, (3, h, w)."""
        plan = self.plan
        if not plan.night:
            day = 0.84 + 0.18 * plan.looks[13]
            tint = (1.0, 0.93, 0.84) if plan.glare else (1.0, 1.0, 1.0)
            return np.reshape(np.array(tint, np.float32) * np.float32(day * (0.62 if plan.glare else 1.0)), (3, 1, 1))
        d = self.y - np.float32(plan.horizon)
        beam = np.zeros((self.height, self.width), np.float32)
        near = np.clip(d / np.float32(0.10), 0, 1) * np.float32(0.9)
        for lamp in (-0.55, 0.55):
            reach = np.abs(self.x - np.float32(plan.vanishing) - np.float32(ACROSS * lamp) * np.maximum(d, 0))
            wide = np.float32(0.07) + np.float32(0.42) * np.maximum(d, 0)
            beam += np.clip(1 - (reach / wide) ** 2, 0, 1) ** 2 * near * np.float32(0.5)
        pools = np.zeros_like(beam)
        for x, y, size in self.lamps:
            across, down = (self.x - np.float32(x)) / np.float32(size * 1.3), (self.y - np.float32(y)) / size
            fall = 1 / (1 + across**2 + down**2)
            pools += fall * fall * np.float32(0.34)
        ambient = 0.09 + 0.055 * plan.looks[14]
        tints = ((0.72, 1.0, 1.0), (0.88, 0.97, 0.8), (1.4, 0.88, 0.52))
        return np.stack([np.float32(ambient * a) + beam * np.float32(b) + pools * np.float32(c) for a, b, c in tints])


class _Ground:
    """The part of a canvas below the horizon, where every pixel has a place on flat ground."""

    def __init__(self, canvas: _Canvas) -> None:
        plan = canvas.plan
        first = min(canvas.height - 1, math.ceil(plan.horizon * canvas.height))
        y = canvas.y[first:]
        d = np.maximum(y - np.float32(plan.horizon), np.float32(0.25 / canvas.height))
        self.view, self.label = canvas.layers[:, first:], canvas.label[first:]
        self.scale = np.float32(ACROSS * canvas.width) * d  # pixels per metre, sideways
        self.lat = (canvas.x - canvas.centre(d)) / (np.float32(ACROSS) * d)  # metres right of the camera
        self.far = np.float32(EYE * FOCAL) / d  # metres away
        self.fade = np.clip((y - np.float32(plan.horizon)) * canvas.height, 0, 1)
        self.grain = _smooth(plan.grain, canvas.x, (y - y[0]) / (1 - y[0])) - np.float32(0.5)

    def band(self, left: float, right: float) -> np.ndarray:
        """Coverage of a strip along the road."""
        inside = np.minimum(self.lat - np.float32(left), np.float32(right) - self.lat)
        return np.minimum(np.maximum(inside * self.scale + np.float32(0.5), 0), 1)

    def lay(self, cover: np.ndarray, colour: Colour, heat: float, texture: float) -> None:
        """Covers the ground; `texture` is how much its colour varies."""
        cover = cover * self.fade
        rough = 1 + self.grain * np.float32(texture)
        for channel in range(3):
            self.view[channel] += (np.float32(colour[channel]) * rough - self.view[channel]) * cover
        self.view[6] += (np.float32(heat) * (1 + self.grain * np.float32(0.04)) - self.view[6]) * cover
        self.view[3:6] *= 1 - cover


class _Spot:
    """Where a thing stands, and the shapes it is made of, back to front.

    Lengths are metres, to the right of the thing's middle and above its foot. All shapes of a thing are rasterised
    together, since at small sizes calls cost more than pixels.
    """

    def __init__(self, canvas: _Canvas, thing: Thing) -> None:
        self.canvas, self.d, self.lat, self.night = canvas, thing.d, thing.lat, canvas.plan.night
        self.sx, self.sy = ACROSS * thing.d * canvas.width, thing.d * canvas.height / EYE
        self.ox = (canvas.centre(thing.d) + ACROSS * thing.d * thing.lat) * canvas.width
        self.oy = (canvas.plan.horizon + thing.d) * canvas.height
        self.quads: list[tuple[Point, Point, Point, Point]] = []
        self.discs: list[tuple[float, float, float, float]] = []
        self.inks: list[tuple[float, ...]] = []
        self.is_quad: list[bool] = []
        self.facing = 1.0  # -1 mirrors what it is made of

    def quad(self, a: Point, b: Point, c: Point, d: Point, colour: Colour, heat: float, glow: Colour = DARK) -> None:
        """A convex quadrilateral, turning either way."""
        self.quads.append((a, b, c, d))
        self.inks.append((*colour, *glow, heat))
        self.is_quad.append(True)

    def bar(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, heat: float, glow: Colour = DARK) -> None:
        """An upright rectangle."""
        self.quad((x0, y0), (x1, y0), (x1, y1), (x0, y1), colour, heat, glow)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour, heat: float, glow: Colour = DARK) -> None:
        """An ellipse."""
        self.discs.append((x, y, rx, ry))
        self.inks.append((*colour, *glow, heat))
        self.is_quad.append(False)

    def settle(self, label: int, part: slice) -> None:
        """Paints the shapes over what lies behind, in the layers of `part`, and labels what they cover."""
        canvas = self.canvas
        origin, scale = np.array((self.ox, self.oy)), np.array((self.sx * self.facing, -self.sy))
        quads = np.array(self.quads, np.float64).reshape(-1, 4, 2) * scale + origin
        discs = np.array(self.discs, np.float64).reshape(-1, 4)
        middles, radii = discs[:, :2] * scale + origin, discs[:, 2:] * np.abs(scale)
        reach = np.concatenate([quads.reshape(-1, 2), middles - radii, middles + radii])
        (left, top), (right, bottom) = np.floor(reach.min(axis=0) - 0.5), np.ceil(reach.max(axis=0) + 0.5)
        left, right = max(0, int(left)), min(canvas.width, int(right))
        top, bottom = max(0, int(top)), min(canvas.height, int(bottom))
        if left >= right or top >= bottom:
            return
        px, py = canvas.px[left:right], canvas.py[top:bottom]
        cover = np.empty((len(self.inks), bottom - top, right - left), np.float32)
        which = np.array(self.is_quad)
        cover[which] = _inside_quads(quads, px, py)
        if len(discs):
            cover[~which] = _inside_discs(middles, radii, px, py)
        np.minimum(np.maximum(cover, 0, out=cover), 1, out=cover)
        # what reaches the eye of a shape is what the shapes in front of it leave
        seen = np.multiply.accumulate(1 - cover[::-1], axis=0)[::-1]
        weight = cover
        weight[:-1] *= seen[1:]
        inks = np.array(self.inks, np.float32)
        view = canvas.layers[part, top:bottom, left:right]
        view *= seen[0]
        view += (weight[:, None] * inks[:, : len(view), None, None]).sum(axis=0)
        canvas.label[top:bottom, left:right][seen[0] < 0.5] = label

    def deep(self, x: float, y: float, length: float) -> Point:
        """The point at (x, y) but `length` metres further away, as a point at this thing's own distance."""
        canvas, d = self.canvas, self.d / (1 + self.d * length / (EYE * FOCAL))
        px = (canvas.centre(d) + ACROSS * d * (self.lat + x)) * canvas.width
        py = (canvas.plan.horizon + d - d * y / EYE) * canvas.height
        return (px - self.ox) / self.sx, (self.oy - py) / self.sy

    def halo(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """Bloom round a light; radius in picture heights."""
        canvas = self.canvas
        place = ((self.ox + x * self.sx) / canvas.width, (self.oy - y * self.sy) / canvas.height)
        canvas.halos.append((*place, radius, colour))

    def shadow(self, half: float, depth: float, warmth: float = 0.0, darkness: float = 0.5) -> None:
        flat = depth * self.d / FOCAL  # how far `depth` metres along the ground reach up the picture
        cx, cy, ry = self.ox, self.oy - flat * 0.3 * self.sy, (flat + 0.06) * self.sy
        self.canvas.shade(self.canvas.ellipse(cx, cy, half * self.sx, ry, soft=0.6), 1 - darkness, warmth)


def _inside_quads(quads: np.ndarray, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Coverage, unclipped, of convex quadrilaterals (n, 4, 2) at pixels: distance to the nearest edge plus a half."""
    step = quads[:, [1, 2, 3, 0]] - quads
    dx, dy = step[..., 0], step[..., 1]
    turn = dx[:, 0] * dy[:, 1] - dy[:, 0] * dx[:, 1] + dx[:, 2] * dy[:, 3] - dy[:, 2] * dx[:, 3]
    length = np.sqrt(dx * dx + dy * dy) * np.where(turn < 0, -1, 1)[:, None]
    flat = np.abs(length) < 1e-9
    length = np.where(flat, 1, length)
    c = np.where(flat, 1e9, (dy * quads[..., 0] - dx * quads[..., 1]) / length + 0.5)
    across = (-dy / length).astype(np.float32)[..., None] * px + c.astype(np.float32)[..., None]
    down = (dx / length).astype(np.float32)[..., None] * py
    edges = across[:, :, None, :] + down[:, :, :, None]
    return np.minimum(np.minimum(edges[:, 0], edges[:, 1]), np.minimum(edges[:, 2], edges[:, 3]))


def _inside_discs(middles: np.ndarray, radii: np.ndarray, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Coverage, unclipped, of ellipses with middles and radii (n, 2)."""
    middles, radii = middles.astype(np.float32), np.maximum(radii, 0.05).astype(np.float32)
    across, down = (px - middles[:, 0:1]) / radii[:, 0:1], (py - middles[:, 1:2]) / radii[:, 1:2]
    radius = np.sqrt((across * across)[:, None, :] + (down * down)[:, :, None])
    return (1 - radius) * np.minimum(radii[:, 0], radii[:, 1])[:, None, None] + np.float32(0.5)


def _car(spot: _Spot, t: tuple[float, ...], front: bool, running: bool) -> None:
    canvas, quad, deep, warm = spot.canvas, spot.quad, spot.deep, spot.canvas.warm
    colour = _pick(PAINTS, t[0])
    tall, half, length = 1.38 + 0.35 * t[1] * t[1], 0.86 + 0.06 * t[2], 3.6 + 0.8 * t[3]
    body = warm((0.10 if running else -0.06) + 0.06 * t[4] + (0.0 if spot.night else 0.06))
    glass_heat, tyre = warm(-0.11), warm(0.28 if running else -0.04)
    glass: Colour = (0.13, 0.16, 0.20)
    waist, roof = 0.88, half * 0.74
    spot.shadow(half * 1.25, 2.0, (0.1 if running else 0.0) * (0.15 if canvas.plan.crossover else 1.0))
    # the flank that faces the camera, and the roof, reach back to the far end
    turn = -1 if spot.ox / canvas.width > canvas.plan.vanishing else 1
    near, inner = half * turn, roof * turn
    side = _times(colour, 0.62)
    quad((near, 0.2), deep(near, 0.2, length), deep(near, waist, length), (near, waist), side, body)
    quad((near, waist), deep(near, waist, length * 0.74), deep(inner, tall, length * 0.56), (inner, tall), side, body)
    edge, eaves = (near * 0.97, waist + 0.06), (inner * 1.02, tall - 0.1)
    pane = edge, deep(*edge, length * 0.66), deep(*eaves, length * 0.5), eaves
    quad(*pane, _times(glass, 0.8), glass_heat)
    far = deep(roof, tall, length * 0.56), deep(-roof, tall, length * 0.56)
    quad((-roof, tall), (roof, tall), *far, _times(colour, 1.1), warm(-0.03))
    for along in (0.2, 0.78):
        x, y = deep(near * 0.98, 0.31, length * along)
        size = 1 / (1 + spot.d * length * along / (EYE * FOCAL))
        narrow = abs(deep(near, 0.0, length * along + 0.3)[0] - deep(near, 0.0, length * along - 0.3)[0]) / 2
        spot.disc(x, y, max(narrow, 0.05), 0.31 * size, (0.05, 0.05, 0.05), tyre)
    # the end that faces the camera
    for x in (-half + 0.13, half - 0.13):
        spot.bar(x - 0.12, 0.0, x + 0.12, 0.4, (0.04, 0.04, 0.04), tyre)
    quad((-half, 0.22), (half, 0.22), (half, waist), (-half, waist), colour, body)
    quad((-half, waist), (half, waist), (roof, tall), (-roof, tall), colour, body)
    low, high = half * 0.88, roof * 0.9
    quad((-low, waist + 0.06), (low, waist + 0.06), (high, tall - 0.09), (-high, tall - 0.09), glass, glass_heat)
    spot.bar(-half, 0.2, half, 0.42, _times(colour, 0.55), body + 0.02)
    lit = spot.night and running
    if front:
        spot.bar(-0.42, 0.44, 0.42, 0.66, (0.08, 0.08, 0.09), warm(0.42) if running else body)
        for x in (-half + 0.2, half - 0.2):
            glow = (1.0, 0.98, 0.86) if lit else DARK
            spot.disc(x, 0.66, 0.17, 0.11, (0.9, 0.9, 0.82), warm(0.3) if lit else body, glow)
            if lit:
                spot.halo(x, 0.66, 0.05 + 0.16 * spot.d, (0.75, 0.72, 0.6))
    else:
        for x in (-half + 0.14, half - 0.14):
            glow = (0.85, 0.07, 0.05) if lit else DARK
            spot.bar(x - 0.12, 0.6, x + 0.12, 0.82, (0.55, 0.04, 0.05), body + (0.04 if lit else 0), glow)
            if lit:
                spot.halo(x, 0.7, 0.02 + 0.06 * spot.d, (0.45, 0.03, 0.02))
        spot.bar(-0.26, 0.5, 0.26, 0.63, (0.82, 0.82, 0.76), body)
        if running:
            spot.disc(0.42, 0.24, 0.14, 0.09, (0.10, 0.10, 0.10), warm(0.5))


def _ahead(spot: _Spot, t: tuple[float, ...]) -> None:
    _car(spot, t, front=False, running=True)


def _oncoming(spot: _Spot, t: tuple[float, ...]) -> None:
    _car(spot, t, front=True, running=True)


def _parked(spot: _Spot, t: tuple[float, ...]) -> None:
    _car(spot, t, front=t[5] < 0.4, running=t[6] < 0.25)


def _person(spot: _Spot, t: tuple[float, ...]) -> None:
    quad, disc, warm = spot.quad, spot.disc, spot.canvas.warm
    tall, stride, lean = 1.55 + 0.28 * t[0], 0.06 + 0.22 * t[1], 0.1 * (t[2] - 0.5)
    dim = 0.4 if spot.night else 1.0  # dark clothes at night, so that only temperature gives people away
    shirt = _times(_pick(CLOTHES, t[3]), dim)
    trousers = _times(_pick(TROUSERS, t[4]), dim)
    skin, hair = _times(_pick(SKINS, t[5]), 0.5 + 0.5 * dim), _pick(HAIR, t[11])
    hot, mild, cool = warm(0.50 + 0.05 * t[6]), warm(0.41), warm(0.33)
    spot.shadow(0.42, 0.4)
    hip, shoulder, neck, head = 0.48 * tall, 0.81 * tall, 0.86 * tall, 0.925 * tall
    bulk = 0.20 + 0.05 * t[7]
    for foot, tone in ((-stride, 0.8), (stride, 1.0)):
        knee, leg = foot * 0.45 + 0.03, _times(trousers, tone)
        bend = hip * 0.52
        quad((foot - 0.07, 0.03), (foot + 0.09, 0.03), (knee + 0.10, bend), (knee - 0.10, bend), leg, cool)
        quad((knee - 0.10, bend), (knee + 0.10, bend), (0.15, hip + 0.06), (-0.15, hip + 0.06), leg, cool)
        spot.bar(foot - 0.08, 0.0, foot + 0.14, 0.07, (0.10, 0.09, 0.09), warm(0.2))
    for swing, tone in ((-stride * 0.6, 0.75), (stride * 0.6, 0.88)):
        x = math.copysign(bulk, swing)
        hand = x + swing
        top = shoulder - 0.02
        quad((x - 0.06, top), (x + 0.06, top), (hand + 0.05, hip), (hand - 0.05, hip), _times(shirt, tone), mild)
        disc(hand, hip - 0.03, 0.055, 0.065, skin, hot)
    left, right = (lean - bulk, shoulder), (lean + bulk, shoulder)
    quad((-bulk * 0.8, hip - 0.05), (bulk * 0.8, hip - 0.05), right, left, shirt, mild)
    quad(left, right, (lean + 0.09, neck), (lean - 0.09, neck), shirt, mild)
    if t[8] < 0.35:  # a bag on the back
        x = bulk * (0.55 if t[9] < 0.5 else -0.55) + lean
        disc(x, 0.66 * tall, 0.13, 0.21, _times(_pick(CLOTHES, t[10]), 0.5 * dim), warm(0.12))
    disc(lean, head + 0.025, 0.118, 0.135, hair, mild)
    disc(lean, head - 0.015, 0.105, 0.118, skin, hot)


def _cone(spot: _Spot, t: tuple[float, ...]) -> None:
    """In RGB only: thin plastic at the temperature of the air, through which the thermal camera sees the rest."""
    orange: Colour = (0.96, 0.36 + 0.1 * t[0], 0.05)
    own = 0.30 if spot.night else 0.0  # retroreflective: the camera car's own lamps come straight back
    spot.shadow(0.42, 0.15, darkness=0.4)
    tall = 0.95

    spot.bar(-0.34, 0.0, 0.34, 0.08, _times(orange, 0.8), 0.0, _times(orange, own))
    white: Colour = (0.95, 0.95, 0.92)
    for low, high, colour in ((0.06, tall, orange), (0.3, 0.46, white), (0.58, 0.7, white)):
        a, b = 0.27 - 0.23 * low / tall, 0.27 - 0.23 * high / tall
        spot.quad((-a, low), (a, low), (b, high), (-b, high), colour, 0.0, _times(colour, own))


def _tree(spot: _Spot, t: tuple[float, ...]) -> None:
    air = spot.canvas.air
    tall = 3.6 + 1.6 * t[0]
    green = _mix((0.20, 0.38, 0.14), (0.42, 0.44, 0.16), t[1])
    spot.shadow(1.0, 0.8)
    spot.quad((-0.13, 0.0), (0.13, 0.0), (0.09, tall * 0.6), (-0.09, tall * 0.6), (0.30, 0.22, 0.16), air)
    for x, y, r, tone in CROWN:
        x, y = x + 0.4 * (t[2] - 0.5), y * tall + 0.3 * (t[3] - 0.5)
        spot.disc(x, y, r, r * 0.86, _times(green, tone), air - 0.09 + 0.03 * (1 - tone))


def _lamp(spot: _Spot, t: tuple[float, ...]) -> None:
    canvas, heat = spot.canvas, spot.canvas.air + 0.02
    tall, arm = 4.4 + 0.8 * t[0], -0.95 if spot.lat > 0 else 0.95
    metal: Colour = (0.30, 0.32, 0.33)
    spot.bar(-0.06, 0.0, 0.06, tall, metal, heat)
    spot.bar(0.0, tall - 0.1, arm, tall, metal, heat)
    spot.disc(arm, tall - 0.12, 0.28, 0.1, (0.8, 0.8, 0.78), heat + 0.08, (1.0, 0.86, 0.55) if spot.night else DARK)
    if spot.night:
        spot.halo(arm, tall - 0.12, 0.03 + 0.10 * spot.d, (0.55, 0.40, 0.18))
        foot = (spot.ox + arm * spot.sx) / canvas.width, spot.oy / canvas.height
        canvas.lamps.append((*foot, 0.05 + 0.7 * spot.d))


def _sign(spot: _Spot, t: tuple[float, ...]) -> None:
    air = spot.canvas.air
    spot.bar(-0.04, 0.0, 0.04, 2.3, (0.45, 0.46, 0.48), air)
    spot.disc(0.0, 2.4, 0.34, 0.34, _pick(SIGNS, t[0]), air - 0.03)
    spot.disc(0.0, 2.4, 0.22, 0.22, (0.9, 0.9, 0.88), air - 0.03)


DRAW = {
    "car": (_ahead, CAR),
    "oncoming": (_oncoming, CAR),
    "parked": (_parked, CAR),
    "person": (_person, PERSON),
    "cone": (_cone, CONE),
    "tree": (_tree, BACKGROUND),
    "lamp": (_lamp, BACKGROUND),
    "sign": (_sign, BACKGROUND),
}
