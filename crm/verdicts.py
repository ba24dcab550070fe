"""What a trained network's measurements say about it: rules with their thresholds, in words, with a setting to change.

Torch-free. `crm.diagnose` takes the measurements. A rule looks at them and at the run's config and returns a finding or
None; to add one, write the function and add its line to RULES. Every number a rule compares with is in THRESHOLDS.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from crm.config import SCHEMA, Config, override

FILE = "diagnosis.json"  # in the run folder

PROBLEM, NOTE = "problem", "note"  # a note is worth knowing and does not make a run unhealthy
OTHER = {"rgb": "thermal", "thermal": "rgb"}
WORDS = {"rgb": "RGB", "thermal": "thermal"}
DISTILLATION = ("complementary", "non_local")  # the terms of Loss in which the network teaches itself


@dataclass(frozen=True)
class Threshold:
    value: float
    reason: str


THRESHOLDS = {
    "learned": Threshold(
        1.5,
        "times the mIoU of naming the most frequent class everywhere. Nearer to that, there is no score of which parts "
        "could be kept, lost or compared",
    ),
    "gap": Threshold(
        0.25,
        "of the clean score, between what taking RGB and what taking thermal costs. Scenes are not symmetric, so some "
        "gap is right: the demo's networks trained with masks or dropout reach 0.15, its plain fusion 0.35 and more",
    ),
    "retention": Threshold(
        0.5,
        "share of the clean score kept without one of two modalities. Half the input is left; below half the score "
        "the rest is not used as input of its own",
    ),
    "agreement": Threshold(
        0.7,
        "share of pixels that keep their class when the run's own masks hide tokens. Between them the modalities still "
        "show everything; the demo's CRM keeps 0.94 of its pixels, its plain fusion 0.77 though it never saw a mask",
    ),
    "erased": Threshold(
        0.5,
        "share of the labelled classes that are still predicted. Below half, pixels that agree under masks agree "
        "because there is little left to disagree on",
    ),
    "distillation": Threshold(
        0.5,
        "share of the terms' gradient norms that is self-distillation's. Above half, the L1 between the network's own "
        "logits, which a constant answer satisfies, steers more than the labels do",
    ),
    "fusion": Threshold(
        1.0,
        "points of mIoU by which the head may do better on one modality alone than on both fused; a few images are not "
        "more exact than that",
    ),
    "fusion_missing": Threshold(
        10.0,
        "points that fusion may cost where one modality is the mean image, against the head fed the other alone. It "
        "costs something, since the norms after fusion have seen two modalities: 2 to 6 points in the demo's CRM",
    ),
    "branch": Threshold(
        0.5,
        "of the better head's score that the other one should reach where both are trained: an outlier among sensors "
        "that both see the scene, as in modality competition",
    ),
    "gradient_share": Threshold(
        0.2,
        "of both branches' gradient norm. Adam evens out sizes over time, so a ratio above 1 to 4 is told, not judged",
    ),
    "conflict": Threshold(
        -0.1,
        "cosine of the two modalities' gradients on the shared head. Unrelated gradients are at 0; below, what helps "
        "one harms the other [Yu et al. 2020, Gradient Surgery]",
    ),
    "noise": Threshold(3.0, "standard errors that a change of the loss must exceed, between means over journal lines"),
    "rising": Threshold(
        0.05, "relative rise of the loss from one fifth of the journal to the last, where it should fall or rest"
    ),
    "falling": Threshold(
        -0.1, "relative fall of the loss from one fifth of the journal to the last, in which the learning rate ends"
    ),
    "clip_always": Threshold(0.99, "share of journal lines whose gradient was clipped: always, but for a line or two"),
    "clip_epsilon": Threshold(
        1e-7,
        "root mean square of a clipped gradient's elements: ten times Adam's epsilon of 1e-8, below which epsilon and "
        "not the gradient sets the size of a step",
    ),
    "silent": Threshold(0.005, "share of the labelled pixels from which on a class that is never predicted is a fault"),
}


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What was measured. Scores are mIoU in per cent; shares go from 0 to 1; None is what could not be measured."""

    clean: float
    missing: dict[str, float]  # modality to the score without it (the mean image in its place)
    head: dict[str, float]  # modality to the score of the head fed that modality's features alone, around fusion
    labelled: dict[str, float]  # class to its share of the labelled pixels, where there are any
    silent: dict[str, float]  # those of them that are never predicted on clean input

    masking: str  # how tokens were hidden
    own_masking: bool  # whether the run was trained with it
    masked: float  # score on masked input
    agreement: float | None  # share of pixels whose class is the same on clean and masked input; None: nothing hidden

    queries: int
    speaking: int  # queries whose likeliest class is, on some image, a class
    matched: int  # queries that the labels are matched to, on some image
    dead: int  # neither

    gradient: dict[str, float]  # part of the network ("rgb", "thermal", "fusion", "head", ...) to the gradient's norm
    cosine: float | None  # of the single-modality terms' gradients on the head; None: the run trains without them
    term_gradient: dict[str, float]  # loss term to the norm of its gradient, over all parameters
    parameters: int

    terms: dict[str, float] | None = None  # loss term to its share of the loss at the end; None: there is no journal
    trend: float | None = None  # relative change of the loss from the journal's last but one fifth to its last
    trend_error: float = 0.0  # standard error of `trend`
    term_trend: dict[str, float] = field(default_factory=dict)
    clipped: float | None = None  # share of journal lines whose gradient norm exceeds optim.clip
    grad_norm: float | None = None  # median, before clipping
    not_finite: tuple[str, ...] = ()  # where nan or inf was found

    def cost(self, modality: str) -> float:
        """Points of mIoU lost when the modality is missing."""
        return self.clean - self.missing[modality]

    @property
    def gap(self) -> float:
        """Reliance gap: how many points more one missing modality costs than the other."""
        return abs(self.cost("rgb") - self.cost("thermal"))

    @property
    def relied_on(self) -> str:
        """The modality whose loss costs more."""
        return max(self.missing, key=self.cost)

    def retention(self, modality: str) -> float:
        """Share of the clean score kept without the modality."""
        return self.missing[modality] / self.clean if self.clean else 0.0

    @property
    def constant(self) -> float:
        """The mIoU of naming the most frequent class everywhere."""
        return 100 * max(self.labelled.values()) / len(self.labelled) if self.labelled else 0.0

    @property
    def branch_share(self) -> dict[str, float] | None:
        """Each branch's share of the sum of both branches' gradient norms; None where both are 0."""
        both = {side: self.gradient.get(side, 0.0) for side in OTHER}
        total = sum(both.values())
        return {side: norm / total for side, norm in both.items()} if total else None

    @property
    def distillation(self) -> float:
        """Self-distillation's share of the sum of the terms' gradient norms."""
        total = sum(self.term_gradient.values())
        return sum(self.term_gradient.get(name, 0.0) for name in DISTILLATION) / total if total else 0.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    rule: str
    level: str  # PROBLEM or NOTE
    text: str  # what is the matter, with its numbers
    settings: dict[str, Any]  # dotted paths to values worth trying; empty where no setting would help
    hint: str = ""  # what to do where that is no setting


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was measured of which checkpoint on what, and what it means."""

    run: str
    selection: str
    step: int
    checkpoint_sha256: str
    dataset: str
    split: str
    images: int  # that were looked at
    scores: str  # "stored" ones of the whole split, or "computed" on the images
    scored_images: int
    draws: int  # of masks per image
    measures: Measures
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        return not any(finding.level == PROBLEM for finding in self.findings)

    def written(self) -> dict[str, Any]:
        """As plain values, with the measurements that follow from others; what is not finite is None."""
        measures = self.measures
        derived = {
            "cost": {side: measures.cost(side) for side in OTHER},
            "gap": measures.gap,
            "retention": {side: measures.retention(side) for side in OTHER},
            "branch_share": measures.branch_share,
            "distillation": measures.distillation,
        }
        plain = {"schema": SCHEMA, "healthy": self.healthy, **asdict(self)}
        plain["measures"] |= derived
        plain["thresholds"] = {name: threshold.value for name, threshold in THRESHOLDS.items()}
        return _plain(plain)


def _plain(value: Any) -> Any:
    """JSON has neither nan nor inf."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Rule = Callable[[Measures, Config], Finding | None]


def judge(measures: Measures, config: Config) -> list[Finding]:
    """What the rules find, problems first. Suggested settings are such that the config takes them.

    Where nan or inf was found there is nothing else to say.
    """
    if diverged := finite(measures, config):
        return [diverged]
    rules = [rule for rule in RULES.values() if rule not in OF_SCORES or not learned(measures, config)]
    if config.model.inputs != "both":
        rules = [rule for rule in rules if rule not in OF_TWO_BRANCHES]
    found = [finding for rule in rules if (finding := rule(measures, config))]
    for finding in found:
        override(config, finding.settings)
    return sorted(found, key=lambda finding: finding.level != PROBLEM)


def _limit(name: str) -> float:
    return THRESHOLDS[name].value


# ---------------------------------------------------------------------------------------------- what to try


def _against_reliance(config: Config, relied_on: str) -> dict[str, Any]:
    """The next step from where the run is towards a network that works on either modality."""
    masking, loss = config.masking, config.loss
    same_scene = {} if masking.view == "clean" else {"masking.view": "clean"}  # which distillation needs
    if masking.kind == "none":
        weights = {f"loss.{name}": getattr(loss, name) or 1.0 for name in ("masked", "rgb", "thermal")}
        return {"masking.kind": "random_complementary", **same_scene, **weights}
    if not (loss.rgb and loss.thermal):
        return {"loss.rgb": loss.rgb or 1.0, "loss.thermal": loss.thermal or 1.0}
    if not (loss.complementary and loss.non_local):
        weights = {f"loss.{name}": getattr(loss, name) or 1.0 for name in ("complementary", "non_local")}
        return {**same_scene, **weights}
    if masking.kind == "modality_dropout":
        return {"masking.drop": round(min(0.5, 1.5 * masking.drop), 3)} if masking.drop < 0.5 else {}
    if masking.kind != "complementary":
        return {
            "masking.kind": "complementary"
        }  # random_complementary leaves a third of the images each modality whole
    # strictly complementary: RGB loses `ratio` of its tokens, thermal the rest; hide more of what is relied on
    ratio = masking.ratio + (0.15 if relied_on == "rgb" else -0.15)
    return {"masking.ratio": round(min(0.85, max(0.15, ratio)), 3)}


def _halved(config: Config, *paths: str) -> dict[str, Any]:
    """These weights of the loss at half their value, those that are 0 left out."""
    weights = {path: getattr(config.loss, path) for path in paths}
    return {f"loss.{path}": weight / 2 for path, weight in weights.items() if weight}


# ---------------------------------------------------------------------------------------------- rules


def finite(measures: Measures, config: Config) -> Finding | None:
    """nan or inf in journal, weights or predictions: training diverged."""
    if not measures.not_finite:
        return None
    text = f"nan or inf in {', '.join(measures.not_finite)}"
    return Finding(rule="finite", level=PROBLEM, text=text, settings={"optim.lr": config.optim.lr / 2})


def learned(measures: Measures, config: Config) -> Finding | None:
    """It scores like an answer that does not look."""
    if measures.clean > _limit("learned") * measures.constant:
        return None
    text = (
        f"has learned little: it scores {measures.clean:.1f}, and naming the most frequent class everywhere "
        f"{measures.constant:.1f}"
    )
    return Finding(rule="learned", level=PROBLEM, text=text, settings={"steps": 2 * config.steps})


def reliance(measures: Measures, config: Config) -> Finding | None:
    """One missing modality costs much more than the other: the network leans on it."""
    if measures.gap <= _limit("gap") * measures.clean:
        return None
    side = measures.relied_on
    text = (
        f"relies on {WORDS[side]}: without it {measures.cost(side):.1f} of {measures.clean:.1f} points are lost, "
        f"without {WORDS[OTHER[side]]} {measures.cost(OTHER[side]):.1f}"
    )
    return Finding(rule="reliance", level=PROBLEM, text=text, settings=_against_reliance(config, side))


def retention(measures: Measures, config: Config) -> Finding | None:
    """Less than half is left without one modality."""
    side = min(measures.missing, key=measures.retention)
    if measures.retention(side) >= _limit("retention"):
        return None
    both = all(measures.retention(each) < _limit("retention") for each in measures.missing)
    text = (
        f"keeps {measures.retention(side):.0%} of its score without {WORDS[side]}"
        + (f" and {measures.retention(OTHER[side]):.0%} without {WORDS[OTHER[side]]}" if both else "")
        + (f"; {WORDS[OTHER[side]]} alone cannot carry it" if not both else ": it needs both")
    )
    return Finding(rule="retention", level=PROBLEM, text=text, settings=_against_reliance(config, side))


def fusion(measures: Measures, config: Config) -> Finding | None:
    """The fused features are worth less than one modality's alone."""
    side = max(measures.head, key=lambda each: measures.head[each])
    if measures.head[side] - measures.clean <= _limit("fusion"):
        return None
    text = (
        f"fusion loses: the head scores {measures.head[side]:.1f} on {WORDS[side]} features alone, "
        f"{measures.clean:.1f} on the fused ones"
    )
    settings = {"loss.fused": 2 * config.loss.fused or 1.0}
    return Finding(rule="fusion", level=PROBLEM, text=text, settings=settings)


def fusion_missing(measures: Measures, config: Config) -> Finding | None:
    """A branch knows better than what comes out when the other modality is missing: fusion passes the damage on."""
    without = {side: measures.head[OTHER[side]] - measures.missing[side] for side in measures.missing}
    side = max(without, key=lambda each: without[each])
    if without[side] <= _limit("fusion_missing"):
        return None
    other = OTHER[side]
    text = (
        f"fusion breaks without {WORDS[side]}: it scores {measures.missing[side]:.1f}, and the head fed {WORDS[other]} "
        f"features alone {measures.head[other]:.1f}"
    )
    return Finding(rule="fusion_missing", level=PROBLEM, text=text, settings=_against_reliance(config, side))


def branch(measures: Measures, config: Config) -> Finding | None:
    """Both heads are trained, and one of them is far behind."""
    if not (config.loss.rgb and config.loss.thermal):
        return None
    weak = min(measures.head, key=lambda each: measures.head[each])
    if measures.head[weak] >= _limit("branch") * measures.head[OTHER[weak]]:
        return None
    text = (
        f"the {WORDS[weak]} branch is behind: the head scores {measures.head[weak]:.1f} on its features alone, "
        f"{measures.head[OTHER[weak]]:.1f} on {WORDS[OTHER[weak]]}"
    )
    settings = {f"loss.{weak}": 2 * getattr(config.loss, weak)}
    return Finding(rule="branch", level=PROBLEM, text=text, settings=settings)


def agreement(measures: Measures, config: Config) -> Finding | None:
    """Trained with masks, and yet its answer changes under them."""
    if not measures.own_masking or measures.agreement is None or measures.agreement >= _limit("agreement"):
        return None
    text = (
        f"inconsistent: {measures.agreement:.0%} of the pixels keep their class under its own masks, and the score "
        f"goes from {measures.clean:.1f} to {measures.masked:.1f}"
    )
    weak = "complementary" if config.loss.masked else "masked"  # first learn on masked input, then agree
    settings = {f"loss.{weak}": 2 * getattr(config.loss, weak) or 1.0}
    return Finding(rule="agreement", level=PROBLEM, text=text, settings=settings)


def distillation(measures: Measures, config: Config) -> Finding | None:
    """Self-distillation outweighs the labels, or has erased what they taught."""
    if not (config.loss.complementary or config.loss.non_local):
        return None
    left = 1 - len(measures.silent) / len(measures.labelled) if measures.labelled else 1.0
    agreed = measures.agreement is not None and measures.agreement >= _limit("agreement")
    if agreed and left < _limit("erased"):  # its gradient may be 0 by then: it has what it wants
        text = (
            f"distillation erases classes: {measures.agreement:.0%} of the pixels agree under masks, but "
            f"{len(measures.silent)} of {len(measures.labelled)} classes are never predicted"
        )
    elif measures.distillation > _limit("distillation"):
        text = f"distillation outweighs the labels: it has {measures.distillation:.0%} of the terms' gradients"
    else:
        return None
    return Finding(rule="distillation", level=PROBLEM, text=text, settings=_halved(config, *DISTILLATION))


def queries(measures: Measures, config: Config) -> Finding | None:
    """Fewer queries ever name a class than there are classes: some class has no query of its own."""
    if measures.speaking >= len(measures.labelled):
        return None
    text = (
        f"dead queries {measures.dead} of {measures.queries}: {measures.speaking} ever name a class, and the images "
        f"have {len(measures.labelled)} classes"
    )
    if measures.queries < 2 * len(measures.labelled):
        return Finding(rule="queries", level=PROBLEM, text=text, settings={"model.queries": 2 * measures.queries})
    # enough of them, but "no object" wins: its class weight decides how dear it is to name a class in vain
    settings = {"loss.no_object": config.loss.no_object / 2}
    return Finding(rule="queries", level=PROBLEM, text=text, settings=settings)


def silent(measures: Measures, config: Config) -> Finding | None:
    """A class that fills a fair share of the labels is never predicted."""
    missed = {name: share for name, share in measures.silent.items() if share >= _limit("silent")}
    if not missed:
        return None
    text = "never predicted: " + ", ".join(f"{name} ({share:.1%} of the labels)" for name, share in missed.items())
    settings = {"steps": 2 * config.steps}
    return Finding(rule="silent", level=PROBLEM, text=text, settings=settings)


def gradient_share(measures: Measures, config: Config) -> Finding | None:
    """One branch gets nearly all of the gradient."""
    if (shares := measures.branch_share) is None:
        return None
    weak = min(shares, key=lambda each: shares[each])
    if shares[weak] >= _limit("gradient_share"):
        return None
    text = f"the {WORDS[weak]} branch gets {shares[weak]:.0%} of the branches' gradient"
    settings = {f"loss.{weak}": 2 * getattr(config.loss, weak) or 1.0}
    return Finding(rule="gradient_share", level=NOTE, text=text, settings=settings)


def conflict(measures: Measures, config: Config) -> Finding | None:
    """The modalities pull the shared head apart."""
    if measures.cosine is None or measures.cosine >= _limit("conflict"):
        return None
    text = f"RGB and thermal pull the shared head apart: their gradients' cosine is {measures.cosine:.2f}"
    return Finding(rule="conflict", level=NOTE, text=text, settings=_halved(config, "rgb", "thermal"))


def rising(measures: Measures, config: Config) -> Finding | None:
    """The loss goes up at the end."""
    if measures.trend is None or measures.trend <= max(_limit("rising"), _limit("noise") * measures.trend_error):
        return None
    text = f"the loss of the last fifth of training is {measures.trend:.0%} above that of the fifth before"
    return Finding(rule="rising", level=PROBLEM, text=text, settings={"optim.lr": config.optim.lr / 2})


def falling(measures: Measures, config: Config) -> Finding | None:
    """The loss still goes down at the end."""
    if measures.trend is None or measures.trend >= min(_limit("falling"), -_limit("noise") * measures.trend_error):
        return None
    text = f"the loss still falls, by {-measures.trend:.0%} from one fifth of training to the last: longer may pay"
    return Finding(rule="falling", level=NOTE, text=text, settings={"steps": 2 * config.steps})


def clip(measures: Measures, config: Config) -> Finding | None:
    """Clipping was always active; that makes Adam's epsilon matter once what is left is small enough."""
    if measures.clipped is None or measures.clipped < _limit("clip_always") or not measures.grad_norm:
        return None
    size = config.optim.clip / math.sqrt(measures.parameters)
    text = (
        f"clipping was active in {measures.clipped:.0%} of the journal's lines: the gradient's norm was "
        f"{measures.grad_norm:.3g} in the median, optim.clip is {config.optim.clip:g}"
    )
    if size >= _limit("clip_epsilon"):
        hint = "no harm by itself: Adam divides by the gradient's usual size"
        return Finding(rule="clip", level=NOTE, text=text, settings={}, hint=hint)
    text += f"; an element of it is {size:.0e} then, and Adam's epsilon 1e-08 shortens the steps"
    return Finding(rule="clip", level=PROBLEM, text=text, settings={"optim.clip": _two_digits(measures.grad_norm)})


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


RULES: Mapping[str, Rule] = {
    "finite": finite,
    "learned": learned,
    "reliance": reliance,
    "retention": retention,
    "fusion": fusion,
    "fusion_missing": fusion_missing,
    "branch": branch,
    "agreement": agreement,
    "distillation": distillation,
    "queries": queries,
    "silent": silent,
    "rising": rising,
    "gradient_share": gradient_share,
    "conflict": conflict,
    "falling": falling,
    "clip": clip,
}

OF_SCORES = (reliance, retention, fusion, fusion_missing, branch)  # which mean nothing where nothing was learned
# which ask one network of two branches to do something about it; a control of it is what it is
OF_TWO_BRANCHES = (*OF_SCORES, agreement, gradient_share, conflict)


# ---------------------------------------------------------------------------------------------- rows of a sweep

BETWEEN_ROWS = Threshold(
    1.0, "points of mIoU between the means of two rows of a sweep; a few images and seeds are not more exact than that"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Means over the runs of one variant; None is what none of them has."""

    runs: int
    clean: float | None
    missing: dict[str, float | None]
    retention: dict[str, float | None]
    gap: float | None
    head: dict[str, float | None]
    masked: float | None
    agreement: float | None
    cosine: float | None
    distillation: float | None
    findings: dict[str, int]  # rule to the number of runs in which it was found
    problems: int  # runs with a finding that is a problem

    def written(self) -> dict[str, Any]:
        return asdict(self)


def _drop(row: float | None, baseline: float | None) -> float:
    """How much lower than the baseline; 0 where one of them is not known."""
    return 0.0 if row is None or baseline is None else baseline - row


def levelled(row: Row, baseline: Row) -> bool:
    """Agrees more than its baseline, and both single-modality heads know less: what was specific is being erased."""
    lost = [_drop(row.head[side], baseline.head[side]) for side in OTHER]
    return _drop(row.agreement, baseline.agreement) < 0 and min(lost) > BETWEEN_ROWS.value


def paid(row: Row, baseline: Row) -> bool:
    """Better than its baseline without a modality, and worse with both: robustness is paid for."""
    gained = [-_drop(row.missing[side], baseline.missing[side]) for side in OTHER]
    return sum(gained) / len(gained) > BETWEEN_ROWS.value and _drop(row.clean, baseline.clean) > BETWEEN_ROWS.value


def leans_more(row: Row, baseline: Row) -> bool:
    """Its reliance gap is wider than its baseline's: it leans more on one modality."""
    return -_drop(row.gap, baseline.gap) > BETWEEN_ROWS.value


ACROSS: Mapping[str, Callable[[Row, Row], bool]] = {"levelled": levelled, "paid": paid, "leans more": leans_more}
