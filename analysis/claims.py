"""What is claimed, as data, and what the run folders say to it: supported, undecided or refuted.

A claim is about the gain of one row of a sweep over another at equal seed. It is supported or refuted when the gain is
told from the threshold at 5 %, with Holm's correction over all claims that are looked at together; the interval shown
is the 95 % one of the tables, without a correction.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.load import Study, read
from analysis.published import PublishedGain, published_gains
from analysis.stats import LEVEL, Estimate, holm, more_seeds, over_seeds, paired
from analysis.tables import Comparison, Measure, latex_text, measures, signed
from crm.data.recordings import recording
from crm.history import History
from crm.names import unknown
from crm.sweep import Sweep

SEED = 0  # of the bootstrap draws, as in the report
SUPPORTED, UNDECIDED, REFUTED = "supported", "undecided", "refuted"


@dataclass(frozen=True, kw_only=True)
class Claim:
    name: str  # lower case with underscores; macros are named after it
    text: str  # what is claimed, in words
    sweep: str  # the form that asks, as in `ablation_losses` or `ablation_losses@pst900_swin_t`
    subject: str  # the row that is said to be better
    reference: str  # than this one
    measure: str = "clean"  # key of analysis.tables.measures
    at_least: float = 0.0  # points of mIoU that the gain exceeds


CLAIMS = [
    Claim(
        name="complementary_masking",
        text="Complementary random masks gain at least 0.5 points over masking each modality by itself, on MF.",
        sweep="ablation_masking_type", subject="random complementary", reference="individual", at_least=0.5,
    ),
    Claim(
        name="modality_wise_supervision",
        text="Supervising each modality by itself gains on MF.",
        sweep="ablation_losses", subject="+ MWS", reference="+ masks",
    ),
    Claim(
        name="complementary_distillation",
        text="Distillation into the masked input (L_SDC) gains on MF.",
        sweep="ablation_losses", subject="+ SDC", reference="+ MWS",
    ),
    Claim(
        name="non_local_distillation",
        text="Distillation into single modalities (L_SDN) gains on MF.",
        sweep="ablation_losses", subject="+ SDN = CRM", reference="+ SDC",
    ),
    Claim(
        name="works_without_a_modality",
        text="Where a modality is missing, CRM keeps at least 5 points more than plain fusion, on the demo's scenes.",
        sweep="demo", subject="CRM", reference="plain fusion", measure="missing", at_least=5.0,
    ),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the run folders say to a claim."""

    claim: Claim
    verdict: str  # SUPPORTED, UNDECIDED or REFUTED
    gain: float  # points, mean over paired seeds; NaN without one
    sd: float  # over seeds; NaN below two
    seeds: int  # paired
    low: float  # of the 95 % interval; NaN without one
    high: float
    over: str  # what the interval speaks of
    p: float  # of the gain being the threshold
    p_holm: float  # the same, corrected for all claims
    without_rare: float | None  # the gain without classes that few test images have; None where there is none
    rare: list[str]  # those classes
    more: int | None  # paired seeds that would decide; 0 for a decided one, None where no number does
    hours: float | None  # of devices that they would take; None where nobody knows
    why: str  # in words
    published: PublishedGain | None


def chosen_claims(names: Sequence[str]) -> list[Claim]:
    """The claims of those names, all without one; ValueError names those that there are."""
    known = {claim.name: claim for claim in CLAIMS}
    for name in names:
        if name not in known:
            raise unknown("claim", name, known)
    return [known[name] for name in names] if names else list(CLAIMS)


def answers(claims: Sequence[Claim], sweeps: Mapping[str, Sweep], runs: Path) -> list[Answer]:
    """What the runs below a folder say to each claim.

    Args:
        sweeps: by the claims' `sweep`, the form that is to answer.
    """
    found = [_found(claim, sweeps[claim.sweep], runs) for claim in claims]
    p = [one.estimate.p(claim.at_least) if one.estimate.n > 1 else math.nan
         for claim, one in zip(claims, found, strict=True)]  # fmt: skip
    adjusted, published, history = holm(p), published_gains(), History(runs)
    level = 1 - (1 - LEVEL) / max(1, sum(not math.isnan(value) for value in p))
    made = []
    for claim, one, plain, corrected in zip(claims, found, p, adjusted, strict=True):
        estimate, decided = one.estimate, bool(corrected < 1 - LEVEL)
        verdict = UNDECIDED if not decided else SUPPORTED if estimate.mean > claim.at_least else REFUTED
        needed = more_seeds(estimate, claim.at_least, level)
        more = 0 if decided else None if one.gone else needed.seeds
        interval = estimate.interval()
        made.append(Answer(
            claim=claim, verdict=verdict, gain=estimate.mean, sd=estimate.sd, seeds=estimate.n,
            low=interval.low if interval else math.nan, high=interval.high if interval else math.nan,
            over=interval.over if interval else "", p=plain, p_holm=float(corrected),
            without_rare=one.without_rare, rare=one.rare, more=more,
            hours=_hours(history, one.sweep, more) if more is not None else None,
            why="" if decided else one.gone or needed.why, published=published.get(claim.name),
        ))  # fmt: skip
    return made


@dataclass(frozen=True)
class _Found:
    estimate: Estimate
    sweep: Sweep | None  # of the two rows alone
    rare: list[str]
    without_rare: float | None
    gone: str  # why the form has no such rows


def _found(claim: Claim, sweep: Sweep, runs: Path) -> _Found:
    for row in (claim.subject, claim.reference):
        if row in sweep.left_out:
            return _Found(over_seeds([]), None, [], None, f"{row!r} is left out: {sweep.left_out[row]}")
        if row not in sweep.variants:
            raise unknown(f"row of {claim.sweep}", row, sweep.variants)
    two = replace(
        sweep, variants={row: sweep.variants[row] for row in (claim.reference, claim.subject)}, groups={}, tiny={},
        baseline=claim.reference, method=claim.subject, interaction=(), dose="", left_out={},
    )  # fmt: skip
    measure = {one.key: one for one in measures(two.conditions)}.get(claim.measure)
    if measure is None:
        raise unknown(f"measure of {claim.sweep}", claim.measure, [one.key for one in measures(two.conditions)])
    study = read(two, runs)
    gain = Comparison(study, np.random.default_rng(SEED)).gain(measure, claim.subject, claim.reference)
    rare, without = _without_rare(study, measure, claim)
    return _Found(gain.estimate or over_seeds([]), two, rare, without, "")


def _without_rare(study: Study, measure: Measure, claim: Claim) -> tuple[list[str], float | None]:
    """Classes that few test images have, and the gain without them."""
    names = [condition.name for condition in measure.conditions]
    rows = [
        {seed: [study.evidence[row, seed, name].confusion for name in names] for seed in study.sweep.seeds
         if all((row, seed, name) in study.evidence for name in names)}
        for row in (claim.subject, claim.reference)
    ]  # fmt: skip
    if not rows[0].keys() & rows[1].keys():
        return [], None
    first = next(iter(study.evidence.values()))
    recordings = [recording(str(name), study.meta["dataset"]) for name in first.names]
    pairs = paired(*rows, recordings, "min" if measure.reduce is np.min else "mean", draws=2)  # the values alone
    if pairs is None or not pairs.rare:
        return [], None
    return [study.meta["classes"][i] for i in pairs.rare], float(pairs.without_rare.mean())


def _hours(history: History, sweep: Sweep | None, seeds: int) -> float | None:
    """Hours of devices that so many more seeds of both rows take, by this project's finished runs."""
    if sweep is None:
        return None
    total = 0.0
    for cell in {cell.variant: cell for cell in sweep.cells()}.values():
        cost = history.cost(cell.config)
        if cost is None or cost.condition is None:
            return None
        seconds = cost.step * cell.config.steps + cost.condition * len(sweep.conditions)
        total += seeds * seconds * cost.processes / 3600
    return total


# ---------------------------------------------------------------------------------------------- written


def plain(answer: Answer) -> dict[str, Any]:
    """As JSON has it."""
    return asdict(answer)


DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


def macro(name: str, part: str) -> str:
    r"""The name of a LaTeX command, which has letters alone: `mask_2`, `gain` is `\CrmMaskTwoGain`."""
    words = re.sub(r"[0-9]", lambda digit: f" {DIGITS[int(digit[0])]} ", f"crm_{name}_{part}")
    return "\\" + "".join(word[:1].upper() + word[1:] for word in re.split(r"[^A-Za-z]+", words))


def macros(made: Sequence[Answer]) -> str:
    r"""A \newcommand for every number of every claim, so that a text quotes what was found.

    ValueError where two claims would have the same command.
    """
    lines = ["% written by `crm claims`; points of mIoU, intervals of 95 %"]
    seen: dict[str, str] = {}
    for answer in made:
        claim = answer.claim
        for part, value in _numbers(answer).items():
            command = macro(claim.name, part)
            if (other := seen.setdefault(command, claim.name)) != claim.name:
                raise ValueError(f"the claims {other!r} and {claim.name!r} would both be {command} in LaTeX")
            lines.append(rf"\newcommand{{{command}}}{{{latex_text(value)}}}")
    return "\n".join(lines) + "\n"


def _numbers(answer: Answer) -> dict[str, str]:
    told = not math.isnan(answer.low)
    published = answer.published
    return {
        "verdict": answer.verdict,
        "gain": signed(answer.gain),
        "sd": f"{answer.sd:.1f}" if answer.seeds > 1 else "—",
        "low": signed(answer.low) if told else "—",
        "high": signed(answer.high) if told else "—",
        "seeds": str(answer.seeds),
        "p": "—" if math.isnan(answer.p_holm) else "< 0.001" if answer.p_holm < 0.001 else f"{answer.p_holm:.3f}",
        "at_least": signed(answer.claim.at_least),
        "published": signed(published.gain) if published else "—",
    }
