"""How a trained run is evaluated: which split, and what is done to each modality.

A condition is never part of a run's identity: robustness costs forward passes, not training. The kinds of degradation,
their meaning and what carries them out stand in `crm.corruptions`; here are their names, read without importing it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from crm.names import chosen, family, unknown

# What a severity is, by the dict of crm.corruptions in which the kind stands: in words, and whether a value is one.
SEVERITIES = {
    "ALWAYS": ("it has none", lambda value: value == 0),
    "SHARES": ("a share above 0 and below 1", lambda value: 0 < value < 1),
    "AMOUNTS": ("an amount above 0", lambda value: 0 < value < float("inf")),
    "THREE": ("1, 2 or 3", lambda value: value in (1, 2, 3)),
    "LEVELS": ("a whole number from 1 to 5", lambda value: value in (1, 2, 3, 4, 5)),
}
# kind of degradation -> key of SEVERITIES
DEGRADATIONS = {kind: group for group in SEVERITIES for kind in family("corruptions/__init__.py", group)}
SEVERE = tuple(kind for kind, group in DEGRADATIONS.items() if group != "ALWAYS")  # the kinds that have a severity
IN_THE_NETWORK = ("missing_token", "missing_route", "block_dropout_token")  # these do not change the pixels


@dataclass(frozen=True, kw_only=True, order=True)
class Degradation:
    kind: str = "clean"  # a key of DEGRADATIONS
    severity: float = 0.0  # 0 for kinds without one

    def __post_init__(self) -> None:
        words, allowed = SEVERITIES[chosen("degradation", self.kind, DEGRADATIONS)]
        if not allowed(self.severity):
            if self.kind not in SEVERE:
                raise ValueError(f"{self.kind} has no severity, got {self.severity:g}")
            how = f"{self.kind}-{self.severity:g}" if self.severity else f"{self.kind} needs a severity"
            raise ValueError(f"{how}: the severity is {words}")

    def __str__(self) -> str:
        return f"{self.kind}-{str(self.severity).removesuffix('.0')}" if self.severity else self.kind


CLEAN = Degradation()


@dataclass(frozen=True, kw_only=True, order=True)
class Condition:
    split: str = "test"
    rgb: Degradation = CLEAN
    thermal: Degradation = CLEAN
    seed: int = 0  # of what the corruptions draw; other draws for repeated measurements

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.split):
            raise ValueError(f"a condition begins with a split, as in test.rgb=fog-3, not with {self.split!r}")
        if self.rgb.kind.startswith("missing") and self.thermal.kind.startswith("missing"):
            raise ValueError("a condition cannot take both modalities away")
        if self.rgb.kind == self.thermal.kind == "shift_with_label":
            raise ValueError("a label can move with one modality, not with both")
        if self.seed < 0 or (self.seed and self.rgb == self.thermal == CLEAN):
            raise ValueError(f"seed {self.seed}: a condition's seed is 0 or more, and a clean condition draws nothing")

    @cached_property
    def name(self) -> str:
        """The condition's name in files, tables and frames, as in `test.rgb=missing_mean`; clean parts are left out."""
        parts = [self.split]
        parts += [f"{side}={how}" for side, how in (("rgb", self.rgb), ("thermal", self.thermal)) if how != CLEAN]
        parts += [f"seed={self.seed}"] * bool(self.seed)
        return ".".join(parts)


def both_sides(kind: str, severities: Iterable[float] = (0.0,)) -> list[Condition]:
    """The condition on RGB alone, then on thermal alone, at each severity."""
    return [*on("rgb", kind, severities := list(severities)), *on("thermal", kind, severities)]


def on(side: str, kind: str, severities: Iterable[float] = (0.0,)) -> list[Condition]:
    """The condition on one modality, at each severity."""
    degradations = [Degradation(kind=kind, severity=severity) for severity in severities]
    return [Condition(rgb=how) if side == "rgb" else Condition(thermal=how) for how in degradations]


def together(kind: str, severities: Iterable[float]) -> list[Condition]:
    """The condition on RGB and thermal at once, at each severity."""
    degradations = [Degradation(kind=kind, severity=severity) for severity in severities]
    return [Condition(rgb=how, thermal=how) for how in degradations]


def complementary(shares: Iterable[float]) -> list[Condition]:
    """Every patch is lost in one modality and there in the other; the shares are RGB's."""
    return [
        Condition(
            rgb=Degradation(kind="common_dropout", severity=share),
            thermal=Degradation(kind="rest_dropout", severity=round(1 - share, 9)),
        )
        for share in shares
    ]


CLEAN_TEST = Condition()
MISSING = both_sides("missing_mean")  # RGB missing, thermal missing: the headline of every report
PICTURED = (CLEAN_TEST, *MISSING)  # the conditions whose prediction maps are kept, for the panels

_SHARES = (0.25, 0.5, 0.75)  # 0 is the clean condition and 1 is missing_mean, so neither is computed twice
_MANY_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
_LEVELS = (10.0, 25.0, 50.0)
_MANY_LEVELS = (5.0, 10.0, 25.0, 50.0, 75.0, 100.0)
_FIVE = (1.0, 2.0, 3.0, 4.0, 5.0)
_THREE = (1.0, 2.0, 3.0)

# By modality: every family of ImageNet-C that means something to that camera, and what it has of its own.
RGB_CORRUPTIONS = (
    "gaussian_noise_c", "shot_noise", "impulse_noise", "speckle_noise", "gaussian_blur", "defocus_blur", "motion_blur",
    "zoom_blur", "brightness", "contrast", "jpeg", "pixelate", "fog", "snow", "low_light", "over_exposure", "glare",
)  # fmt: skip
THERMAL_CORRUPTIONS = (
    "netd_noise", "column_noise", "stripes", "nonuniformity", "halo", "dead_pixels", "dead_lines", "gaussian_blur",
    "contrast", "object_crossover", "agc", "shift", "rotation", "time_offset", "shot_noise", "impulse_noise",
    "speckle_noise", "defocus_blur", "motion_blur", "zoom_blur", "brightness", "jpeg", "pixelate",
)  # fmt: skip
_BLOCKS = ("block_dropout", "block_dropout_zero", "block_dropout_token")


def _with_headline(*conditions: Condition) -> list[Condition]:
    """A suite: clean, each modality missing, and these."""
    return list(dict.fromkeys([CLEAN_TEST, *MISSING, *conditions]))


def _each(side: str, kinds: Iterable[str]) -> list[Condition]:
    return [one for kind in kinds for one in on(side, kind, _FIVE)]


def _grid(rgb: str, thermal: str) -> list[Condition]:
    """Clean and five severities of RGB, times the same of thermal."""
    sides = [[CLEAN, *(Degradation(kind=kind, severity=level) for level in _FIVE)] for kind in (rgb, thermal)]
    return [Condition(rgb=one, thermal=other) for one, other in product(*sides)]


# name -> conditions; a sweep names its suite
SUITES: dict[str, Sequence[Condition]] = {
    "clean": [CLEAN_TEST],
    # what stands for a missing modality: mean image, black image, mask tokens, a way around fusion
    "missing": [
        CLEAN_TEST,
        *MISSING,
        *both_sides("missing_zero"),
        *both_sides("missing_token"),
        *both_sides("missing_route"),
    ],
    # EMM, RMM and NM: Liao et al., CVPR-W 2025, arXiv:2503.18445. Subsets of two modalities, the empty one left out;
    # a missing tensor is 0 after normalisation, which is the mean image
    "emm": _with_headline(),
    "rmm": _with_headline(*both_sides("element_dropout", _SHARES), *both_sides("block_dropout", _SHARES)),
    "nm": _with_headline(*together("nm", _THREE), *together("nm_grey", _THREE)),
    # share of the patches that is lost: of one modality, in both at the same places, of each the other's rest
    "dropout_curve": _with_headline(
        *both_sides("patch_dropout", _MANY_SHARES),
        *together("common_dropout", _MANY_SHARES),
        *complementary(_MANY_SHARES),
    ),
    "noise_curve": _with_headline(
        *both_sides("gaussian_noise", _MANY_LEVELS), *together("gaussian_noise", _MANY_LEVELS)
    ),
    "corruptions_rgb": _with_headline(*both_sides("missing_route"), *_each("rgb", RGB_CORRUPTIONS)),
    "corruptions_thermal": _with_headline(
        *both_sides("missing_route"),
        *_each("thermal", THERMAL_CORRUPTIONS),
        *on("thermal", "polarity_flip"),
        *on("thermal", "flat_field"),
        *on("thermal", "previous_frame"),
        *(one for kind in _BLOCKS for one in on("thermal", kind, _MANY_SHARES)),
    ),
    # what hits both cameras at once, beside each alone
    "paired": _with_headline(*together("platform_blur", _FIVE), *both_sides("platform_blur", _FIVE)),
    # thermal moved against RGB and the label; RGB moved against thermal and the label, and with the label
    "misregistration": _with_headline(
        *both_sides("shift", _FIVE), *both_sides("shift_with_label", _FIVE), *both_sides("rotation", _FIVE)
    ),
    # for the slices by day and night of what is stored: synthetic night beside the real one
    "day_night": _with_headline(*both_sides("missing_route"), *on("rgb", "low_light", _FIVE)),
    "grid": _with_headline(*_grid("low_light", "netd_noise")),
}
SUITES["robustness"] = [
    *SUITES["missing"],
    *both_sides("patch_dropout", _SHARES),
    *both_sides("gaussian_noise", _LEVELS),
    *together("gaussian_noise", _LEVELS),
]
SUITES["paper"] = list(dict.fromkeys(one for conditions in SUITES.values() for one in conditions))


def suite(name: str) -> Sequence[Condition]:
    """The conditions of a suite; ValueError names the suites that exist."""
    return chosen("suite", name, SUITES)


def condition(name: str) -> Condition:
    """The condition of a name as `Condition.name` writes it, as in `test.rgb=patch_dropout-0.5`."""
    split, *parts = re.split(r"\.(?=[^.]*=)", name)  # severities hold dots too
    sides: dict[str, Degradation] = {}
    seed = 0
    for part in parts:
        side, equals, how = part.partition("=")
        if side == "seed":
            seed = _whole(how)
            continue
        if side not in ("rgb", "thermal") or not equals:
            raise unknown("side of a condition", side, ("rgb", "thermal"))
        if side in sides:
            raise ValueError(f"condition {name!r} says twice what is done to {side}")
        kind, _, severity = how.partition("-")
        try:
            number = float(severity or 0)
        except ValueError:
            raise ValueError(f"{how!r}: a severity is a number, as in patch_dropout-0.5, not {severity!r}") from None
        sides[side] = Degradation(kind=kind, severity=number)
    return Condition(split=split, seed=seed, **sides)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"a condition's seed is a whole number, as in test.rgb=fog-3.seed=1, not {text!r}")
    return int(text)
