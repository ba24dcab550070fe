"""How a trained run is evaluated: which split, and what is done to each modality.

A condition is never part of a run's identity: robustness costs forward passes, not training. Every kind of degradation
stands in DEGRADATIONS with its meaning; the functions that carry them out are in `crm.corruptions`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from crm.names import chosen, unknown

# kind -> what it does to one modality, and what its severity means
DEGRADATIONS = {
    "clean": "the modality as recorded",
    "missing_mean": "every pixel is the data set's mean (0 after normalisation); the usual meaning of missing",
    "missing_zero": "every raw pixel is 0 (a black image)",
    "missing_token": "every token is the branch's learned mask token; needs a run trained with masks",
    "missing_route": "the other branch's features go to the head alone, around fusion and its BatchNorm",
    "patch_dropout": "a share `severity` of the 16-pixel patches is the mean image; 1 equals missing_mean",
    "gaussian_noise": "noise N(0, severity) is added to the pixels, in grey levels of 0..255, then clipped",
}
SEVERE = ("patch_dropout", "gaussian_noise")  # the kinds that have a severity


@dataclass(frozen=True, kw_only=True, order=True)
class Degradation:
    kind: str = "clean"  # a key of DEGRADATIONS
    severity: float = 0.0  # 0 for kinds without one

    def __post_init__(self) -> None:
        chosen("degradation", self.kind, DEGRADATIONS)
        if bool(self.severity) != (self.kind in SEVERE):
            raise ValueError(
                f"{self.kind} {'needs' if self.kind in SEVERE else 'has no'} severity, got {self.severity}"
            )
        if not 0 <= self.severity < float("inf") or (self.kind == "patch_dropout" and self.severity >= 1):
            raise ValueError(f"{self.kind} {self.severity}: a share is above 0 and below 1, a noise level above 0")

    def __str__(self) -> str:
        return f"{self.kind}-{str(self.severity).removesuffix('.0')}" if self.severity else self.kind


CLEAN = Degradation()


@dataclass(frozen=True, kw_only=True, order=True)
class Condition:
    split: str = "test"
    rgb: Degradation = CLEAN
    thermal: Degradation = CLEAN

    def __post_init__(self) -> None:
        if self.rgb.kind.startswith("missing") and self.thermal.kind.startswith("missing"):
            raise ValueError("a condition cannot take both modalities away")

    @property
    def name(self) -> str:
        """The condition's name in files, tables and frames, as in `test.rgb=missing_mean`; clean parts are left out."""
        parts = [self.split]
        parts += [f"{side}={how}" for side, how in (("rgb", self.rgb), ("thermal", self.thermal)) if how != CLEAN]
        return ".".join(parts)


def both_sides(kind: str, severities: Iterable[float] = (0.0,)) -> list[Condition]:
    """The condition on RGB alone, then on thermal alone, at each severity."""
    degradations = [Degradation(kind=kind, severity=severity) for severity in severities]
    return [Condition(rgb=how) for how in degradations] + [Condition(thermal=how) for how in degradations]


def together(kind: str, severities: Iterable[float]) -> list[Condition]:
    """The condition on RGB and thermal at once, at each severity."""
    degradations = [Degradation(kind=kind, severity=severity) for severity in severities]
    return [Condition(rgb=how, thermal=how) for how in degradations]


CLEAN_TEST = Condition()
MISSING = both_sides("missing_mean")  # RGB missing, thermal missing: the headline of every report
PICTURED = (CLEAN_TEST, *MISSING)  # the conditions whose prediction maps are kept, for the panels

_SHARES = (0.25, 0.5, 0.75)  # 0 is the clean condition and 1 is missing_mean, so neither is computed twice
_LEVELS = (10.0, 25.0, 50.0)

# name -> conditions; a sweep names its suite
SUITES: dict[str, Sequence[Condition]] = {
    "clean": [CLEAN_TEST],
    "missing": [
        CLEAN_TEST,
        *MISSING,
        *both_sides("missing_zero"),
        *both_sides("missing_token"),
        *both_sides("missing_route"),
    ],
}
SUITES["robustness"] = [
    *SUITES["missing"],
    *both_sides("patch_dropout", _SHARES),
    *both_sides("gaussian_noise", _LEVELS),
    *together("gaussian_noise", _LEVELS),
]


def suite(name: str) -> Sequence[Condition]:
    """The conditions of a suite; ValueError names the suites that exist."""
    return chosen("suite", name, SUITES)


def condition(name: str) -> Condition:
    """The condition of a name as `Condition.name` writes it, as in `test.rgb=patch_dropout-0.5`."""
    split, *parts = _split_name(name)
    sides: dict[str, Degradation] = {}
    for part in parts:
        side, equals, how = part.partition("=")
        if side not in ("rgb", "thermal") or not equals:
            raise unknown("side of a condition", side, ("rgb", "thermal"))
        kind, _, severity = how.partition("-")
        try:
            number = float(severity or 0)
        except ValueError:
            raise ValueError(f"{how!r}: a severity is a number, as in patch_dropout-0.5, not {severity!r}") from None
        sides[side] = Degradation(kind=kind, severity=number)
    return Condition(split=split, **sides)


def _split_name(name: str) -> list[str]:
    """The name cut at the dots before `rgb=` and `thermal=` only, since severities hold dots too."""
    for side in ("rgb", "thermal"):
        name = name.replace(f".{side}=", f"\n{side}=")
    return name.split("\n")
