"""What the scores of many conditions say together: averages, curves, expectations, and what a network leans on.

numpy only; computed from stored evaluations, never by running a network. Scores are mIoU in per cent, by condition.
Of a corruption, x is its severity, amount or share.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from crm.conditions import CLEAN_TEST, DEGRADATIONS, IN_THE_NETWORK, MISSING, Condition, Degradation
from crm.confusion import Evaluation

Scores = Mapping[Condition, float]
Curve = Sequence[tuple[float, float]]  # x and score, x ascending

PROBABILITIES = (0.2, 0.1, 0.05)  # of a missing modality, as published for EMM and RMM
TO_THE_END = ("patch_dropout", "block_dropout", "element_dropout")  # a share of 1 is the mean image


class Family(NamedTuple):
    """Conditions that differ in their severity alone."""

    side: str  # rgb, thermal, both, or complementary: every patch lost in one modality and there in the other
    kind: str

    def __str__(self) -> str:
        return f"{self.side} {self.kind}"


def family_of(condition: Condition) -> tuple[Family, float] | None:
    """The family of a condition and its place x there; None: clean, without a severity, or two corruptions at once."""
    rgb, thermal = condition.rgb, condition.thermal
    if rgb == thermal and rgb.severity:
        return Family("both", rgb.kind), rgb.severity
    if (rgb.kind, thermal.kind) == ("common_dropout", "rest_dropout"):
        return (Family("complementary", "dropout"), rgb.severity) if _adds_up(rgb, thermal) else None
    for side, how, other in (("rgb", rgb, thermal), ("thermal", thermal, rgb)):
        if how.severity and other.kind == "clean":
            return Family(side, how.kind), how.severity
    return None


def _adds_up(rgb: Degradation, thermal: Degradation) -> bool:
    return abs(rgb.severity + thermal.severity - 1) < 1e-9


def families(conditions: Sequence[Condition]) -> dict[Family, list[tuple[float, Condition]]]:
    """The families of a suite, each with its conditions by x; of the test split and seed 0.

    x = 0 is the clean condition. Where a share of 1 is a missing modality, that is x = 1.
    """
    found: dict[Family, list[tuple[float, Condition]]] = {}
    known = set(conditions)
    for condition in conditions:
        placed = family_of(condition)
        if placed is None or condition.split != CLEAN_TEST.split or condition.seed:
            continue
        found.setdefault(placed[0], []).append((placed[1], condition))
    missing = dict(zip(("rgb", "thermal"), MISSING, strict=True))
    for family, steps in found.items():
        ends = {0.0: CLEAN_TEST}
        if family.kind in TO_THE_END and family.side in missing:
            ends[1.0] = missing[family.side]
        if family.side == "complementary":
            ends = {0.0: missing["thermal"], 1.0: missing["rgb"]}
        steps += [(x, end) for x, end in ends.items() if end in known]
        steps.sort(key=lambda step: step[0])
    return found


def curve(scores: Scores, steps: Sequence[tuple[float, Condition]]) -> Curve:
    """The points of a family that have a score."""
    return [(x, scores[condition]) for x, condition in steps if condition in scores]


# ---------------------------------------------------------------------------------------------- corruptions


def corruption_scores(scores: Scores) -> dict[Family, list[float]]:
    """Of every corruption with severities 1 to 5, the scores by severity; ValueError if one lacks a severity."""
    found = {}
    for family, steps in families(list(scores)).items():
        if DEGRADATIONS.get(family.kind) != "LEVELS":
            continue
        known = {x: scores[condition] for x, condition in steps if x}
        if sorted(known) != [1, 2, 3, 4, 5]:
            raise ValueError(f"{family}: a mean over corruptions needs severities 1 to 5, not {sorted(known)}")
        found[family] = [known[x] for x in sorted(known)]
    return found


def mpc(scores: Scores) -> float:
    """Mean performance under corruption: the mean over corruptions of the mean over severities; NaN without one.

    [Michaelis et al., arXiv:1907.07484, eq. 1]
    """
    means = [float(np.mean(values)) for values in corruption_scores(scores).values()]
    return float(np.mean(means)) if means else float("nan")


def retention(scores: Scores) -> float:
    """mPC as a share of the clean score, in per cent (rPC, arXiv:1907.07484, eq. 2)."""
    return 100 * mpc(scores) / scores[CLEAN_TEST]


def mcd(scores: Scores, reference: Scores) -> float:
    """Mean corruption degradation against a reference network, in per cent: below 100 is more robust than it.

    CD of a corruption is the sum over severities of 100 - mIoU, over that of the reference; mCD is the mean over the
    corruptions that both have [Kamann and Rother, CVPR 2020; after mCE of Hendrycks and Dietterich, ICLR 2019].
    """
    return _degradation(scores, reference, 100.0, 100.0)


def rcd(scores: Scores, reference: Scores) -> float:
    """As `mcd`, of what is lost from each network's own clean score: relative corruption degradation."""
    return _degradation(scores, reference, scores[CLEAN_TEST], reference[CLEAN_TEST])


def _degradation(scores: Scores, reference: Scores, top: float, reference_top: float) -> float:
    own, other = corruption_scores(scores), corruption_scores(reference)
    ratios = []
    for family in own.keys() & other.keys():
        below = sum(reference_top - score for score in other[family])
        ratios.append(sum(top - score for score in own[family]) / below if below else float("nan"))
    return 100 * float(np.mean(ratios)) if ratios else float("nan")


# ---------------------------------------------------------------------------------------------- curves


def area(points: Curve, clean: float) -> float:
    """The area under a curve as a share of a network that keeps its clean score all along, in per cent.

    By trapezoids, over the range of x that the curve has. ValueError for fewer than two points.
    """
    if len(points) < 2:
        raise ValueError("an area needs a curve of at least two points")
    x, y = np.array(points, dtype=float).T
    return 100 * float(np.trapezoid(y, x)) / (clean * (x[-1] - x[0]))


def falls_below(points: Curve, score: float) -> float | None:
    """The first x at which a curve, straight between its points, is below a score; None where it never is."""
    if points and points[0][1] < score:
        return points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 < score <= y0:
            return x0 + (x1 - x0) * (y0 - score) / (y0 - y1)
    return None


def kept(points: Curve, clean: float, share: float) -> float | None:
    """The x up to which a curve keeps this share of the clean score; None: to the end of the curve."""
    return falls_below(points, share * clean)


def crossing(points: Curve, single: float) -> float | None:
    """The x from which on the best single-modality network, which has the score `single`, would be better."""
    return falls_below(points, single)


# ---------------------------------------------------------------------------------------------- missing modalities


def subsets(scores: Scores, kind: str = "missing_mean", severity: float = 0.0) -> dict[frozenset[str], float]:
    """The score of each subset of modalities that `kind` befalls, the one of both left out; KeyError if one is missing.

    `missing_mean` is EMM, `element_dropout` at a share is RMM as published, `block_dropout` RMM by blocks.
    """
    how = Degradation(kind=kind, severity=severity)
    return {
        frozenset(): scores[CLEAN_TEST],
        frozenset({"rgb"}): scores[Condition(rgb=how)],
        frozenset({"thermal"}): scores[Condition(thermal=how)],
    }


def average(by_subset: Mapping[frozenset[str], float]) -> float:
    """The plain mean over the subsets, the intact case among them [Liao et al., CVPR-W 2025, arXiv:2503.18445]."""
    return float(np.mean(list(by_subset.values())))


def expectation(by_subset: Mapping[frozenset[str], float], p: float, modalities: int = 2) -> float:
    """E(p): the expected score if each modality is missing with probability p, independently, and never all are.

    The weight of a subset S of m modalities is p^|S| (1 - p)^(m - |S|); they are divided by their sum, since the case
    of all missing is left out [Liao et al.]. For m = 2: ((1 - p) full + p (RGB out) + p (thermal out)) / (1 + p).
    """
    if not 0 <= p < 1:
        raise ValueError(f"the probability of a missing modality is at least 0 and below 1, not {p}")
    weights = {gone: p ** len(gone) * (1 - p) ** (modalities - len(gone)) for gone in by_subset}
    return sum(weights[gone] * score for gone, score in by_subset.items()) / sum(weights.values())


def reliance_gap(scores: Scores) -> float:
    """|mIoU with RGB missing - mIoU with thermal missing|: how unevenly the network leans on its modalities."""
    rgb, thermal = (scores[condition] for condition in MISSING)
    return abs(rgb - thermal)


def single_best(scores: Scores) -> float | None:
    """The better score of the network's own branches, each fed to the head alone; None where not evaluated."""
    routes = [Condition(rgb=_route()), Condition(thermal=_route())]
    return max(scores[route] for route in routes) if all(route in scores for route in routes) else None


def _route() -> Degradation:
    return Degradation(kind="missing_route")


def worst(scores: Scores) -> tuple[Condition, float]:
    """The condition with the lowest score, among those that change what the network is given."""
    given = [c for c in scores if c.rgb.kind not in IN_THE_NETWORK and c.thermal.kind not in IN_THE_NETWORK]
    lowest = min(given, key=lambda condition: scores[condition])
    return lowest, scores[lowest]


# ---------------------------------------------------------------------------------------------- all of them


def scores_of(evaluations: Mapping[Condition, Evaluation], subset: str | None = None) -> dict[Condition, float]:
    """mIoU by condition, of all images or those by `day` or at `night`; what has no such image is left out."""
    parts = {condition: found.part(subset) if subset else found for condition, found in evaluations.items()}
    return {condition: part.miou for condition, part in parts.items() if len(part.names)}


def summary(scores: Scores, reference: Scores | None = None, single: float | None = None) -> dict[str, float | None]:
    """Every metric that the evaluated conditions allow, by name; None for an x that lies beyond a curve.

    Args:
        reference: scores of the network that mCD compares with.
        single: score of the best single-modality network; by default that of this one's better branch alone.
    """
    clean = scores[CLEAN_TEST]
    found: dict[str, float | None] = {"clean": clean}
    if len(scores) > 1:
        found["worst"] = worst(scores)[1]
    for name, kind, severities in (
        ("EMM", "missing_mean", (0.0,)),
        ("EMM black", "missing_zero", (0.0,)),
        ("RMM", "element_dropout", (0.25, 0.5, 0.75)),
        ("RMM blocks", "block_dropout", (0.25, 0.5, 0.75)),
    ):
        for severity in severities:
            how = Degradation(kind=kind, severity=severity)
            if not {Condition(rgb=how), Condition(thermal=how)} <= scores.keys():
                continue
            cases, label = subsets(scores, kind, severity), f"{name} {severity:g}" if severity else name
            found[f"{label} average"] = average(cases)
            found |= {f"{label} E({p:g})": expectation(cases, p) for p in PROBABILITIES}
    if set(MISSING) <= scores.keys():
        found["reliance gap"] = reliance_gap(scores)
    sides = {family.side for family in corruption_scores(scores)}
    for side in sorted(sides):
        part = {c: s for c, s in scores.items() if c == CLEAN_TEST or ((f := family_of(c)) and f[0].side == side)}
        found[f"mPC {side}"], found[f"retention {side}"] = mpc(part), retention(part)
        if reference is not None:
            own = {condition: score for condition, score in reference.items() if condition in part}
            found[f"mCD {side}"], found[f"rCD {side}"] = mcd(part, own), rcd(part, own)
    single = single_best(scores) if single is None else single
    for family, steps in families(list(scores)).items():
        points = curve(scores, steps)
        if DEGRADATIONS.get(family.kind, "SHARES") in ("LEVELS", "THREE") or len(points) < 3:
            continue
        found |= {f"{name} {family}": value for name, value in along(points, clean, single).items()}
    return found


def along(points: Curve, clean: float, single: float | None) -> dict[str, float | None]:
    """What there is to say about one curve: its area, and if it begins at the clean score where it falls."""
    found: dict[str, float | None] = {"area": area(points, clean)}
    if points[0] == (0.0, clean):
        found |= {f"kept {share:.0%}": kept(points, clean, share) for share in (0.9, 0.5)}
        if single is not None:
            found["crossing"] = crossing(points, single)
    return found
