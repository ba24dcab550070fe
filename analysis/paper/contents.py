"""The paper's tables, as data. In their tiny form the same tables ask the sweeps' tiny forms.

Rows name variants of sweeps, so a variant that is renamed there has to be renamed here; a test says which. Numbers of
other papers are keys of analysis/published.csv.
"""

from collections.abc import Callable, Sequence

from analysis.claims import CLAIMS
from analysis.paper.spec import Column, Row, Table
from analysis.published import published_gains, results
from crm.conditions import MISSING, SUITES
from crm.data.specs import DATASETS
from crm.sweep import Sweep
from sweeps import (
    ablation_fusion,
    ablation_losses,
    ablation_mask_ratio,
    ablation_masking_type,
    ablation_patch_size,
    ablation_sharing,
    cross_dataset,
    main_results,
    overhead,
    robustness,
)
from sweeps.backbones import SWINS
from sweeps.datasets import SETS, TITLES

DATASET = {title: name for name, title in TITLES.items()}  # title -> name, as in MF -> mf
RGB_MISSING, THERMAL_MISSING = (condition.name for condition in MISSING)
CLEAN = Column(label="clean")
BOTH_MISSING = Column(label="mean of both missing", conditions=(RGB_MISSING, THERMAL_MISSING))
ROBUST = (
    CLEAN,
    Column(label="RGB missing", conditions=(RGB_MISSING,)),
    Column(label="thermal missing", conditions=(THERMAL_MISSING,)),
    BOTH_MISSING,
)


def tables(tiny: bool = False) -> dict[str, Table]:
    """Every table by its name, in the order of the paper."""
    made = [make(tiny) for make in TABLES]
    return {table.name: table for table in made}


def _rows(name: str, sweep: Sweep) -> list[Row]:
    """A row per variant; the baseline first, since gains are over the first row of a group."""
    rows = []
    for group, part in sweep.parts().items():
        labels = sorted(part.variants, key=lambda label: label != part.reference)
        rows += [Row(label=label, group=group, sweep=name, variant=label) for label in labels]
    return rows


def _of_sweep(name: str, sweep: Sweep, title: str, columns: Sequence[Column] = ROBUST, figure: str = "") -> Table:
    return Table(
        name=name.removeprefix("ablation_"), title=title, columns=columns, rows=_rows(name, sweep), figure=figure,
        notes=_published_gains(name),
    )  # fmt: skip


def _published_gains(sweep: str) -> list[str]:
    """What was published of a sweep's rows without the numbers that it is a difference of."""
    known = published_gains()
    found = [(claim, known[claim.name]) for claim in CLAIMS if claim.sweep == sweep and claim.name in known]
    return [f"Published: “{one.subject}” {by.gain:+.1f} over “{one.reference}”; {by.source}." for one, by in found]


def main(tiny: bool) -> Table:
    """Both methods on every data set with every backbone, other methods above them."""
    columns = [Column(label="mIoU", group=title, key=title) for title in SETS]
    by_column = {f"{title}: mIoU": DATASET[title] for title in SETS}
    others: dict[str, Row] = {}
    for found in sorted(results().values(), key=lambda found: (found.year, found.method)):
        if not found.experiment:
            keys = {column: f"{found.method}/{name}" for column, name in by_column.items()}
            there = {column: key for column, key in keys.items() if key in results()}
            label = f"{found.method} ({found.year})"
            others[label] = Row(label=label, group="published", published=there)
    ours = [
        Row(
            label=f"{method} (ours)",
            group=swin,
            sweep="main_results",
            variant=f"{{}}, {swin}, {method}",
            published={column: f"CRM, {swin}/{name}" for column, name in by_column.items()} if method == "CRM" else {},
        )
        for swin in SWINS
        for method in main_results.METHODS
    ]
    return Table(
        name="main",
        title="Test mIoU on MF, PST900 and KP",
        columns=columns,
        rows=[*others.values(), *ours],
        notes=["Published numbers were mostly chosen on the test split; ours are of the last checkpoint."],
    )


def reproduction(tiny: bool) -> Table:
    """The released recipe, its checkpoint chosen as published and not chosen at all."""
    columns = [
        column
        for title in SETS
        for column in (
            Column(label="best on test", group=title, key=title, selection="test_best", metric="released_miou"),
            Column(label="last", group=title, key=title, selection="last", metric="released_miou"),
        )
    ]
    rows = [
        Row(
            label=swin,
            sweep="reproduction",
            variant=f"{{}}, {swin}",
            published={f"{title}: best on test": f"CRM, {swin}/{name}" for title, name in DATASET.items()},
        )
        for swin in SWINS
    ]
    return Table(
        name="reproduction",
        title="The released recipe: the checkpoint that is best on test, as published, and the last one",
        columns=columns,
        rows=rows,
        compare="none",
        notes=["Mean IoU as the released code has it: a class that occurs nowhere counts 0."],
        figure="optimism",
    )


def _crm_and_max(name: str, title: str, columns: Sequence[Column]) -> Table:
    rows = [
        Row(label=f"{method}, {swin}", group=swin, sweep="main_results", variant=f"{{}}, {swin}, {method}")
        for swin in SWINS
        for method in main_results.METHODS
    ]
    return Table(name=name, title=title, columns=columns, rows=rows)


def per_class(tiny: bool) -> Table:
    """IoU of each class of MF."""
    classes = DATASETS["synthetic" if tiny else "mf"].classes
    columns = [Column(label=name.replace("_", " "), key="MF", metric=f"iou:{name}") for name in classes]
    whole = [Column(label="mIoU", key="MF"), Column(label="without class 0", key="MF", metric="miou_without_0")]
    return _crm_and_max("per_class", "IoU per class on MF", [*columns, *whole])


def day_night(tiny: bool) -> Table:
    """By day and at night, where the data set says which is which."""
    columns = [
        Column(label=time, group=title, key=title, metric=f"miou:{time}")
        for title, name in DATASET.items()
        if DATASETS[name].night_pattern
        for time in ("day", "night")
    ]
    return _crm_and_max("day_night", "Test mIoU by day and at night", columns)


def components(tiny: bool) -> Table:
    return _of_sweep("ablation_losses", ablation_losses.sweep, "What each part of CRM adds", figure="dots")


def masking_type(tiny: bool) -> Table:
    return _of_sweep("ablation_masking_type", ablation_masking_type.sweep, "Masking types", figure="dots")


def patch_size(tiny: bool) -> Table:
    return _of_sweep("ablation_patch_size", ablation_patch_size.sweep, "Size of the hidden patches", figure="dose")


def mask_ratio(tiny: bool) -> Table:
    return _of_sweep("ablation_mask_ratio", ablation_mask_ratio.sweep, "Share that is hidden", figure="dose")


def fusion(tiny: bool) -> Table:
    return _of_sweep("ablation_fusion", ablation_fusion.sweep, "Fusion, alone and with CRM", figure="dots")


def sharing(tiny: bool) -> Table:
    parameters = _cost("parameters, M", "parameters")
    return _of_sweep(
        "ablation_sharing", ablation_sharing.sweep, "Blocks that both branches share", (*ROBUST, parameters)
    )


def withstood(tiny: bool) -> Table:
    """A number per family of damage, the mean over its suite."""
    families = {"EMM": "emm", "RMM": "rmm", "NM": "nm"}
    columns = [
        CLEAN,
        *ROBUST[1:3],
        *(
            Column(label=label, conditions=tuple(how.name for how in SUITES[name]), group="mean over the suite")
            for label, name in families.items()
        ),
        Column(label="worst of NM", conditions=tuple(how.name for how in SUITES["nm"]), reduce="min"),
    ]
    rows = _rows("robustness", robustness.sweep)
    if tiny:  # these runs have the demo's size, and take minutes
        rows = [row for row in rows if row.label in (robustness.sweep.reference, robustness.sweep.subject)]
    return Table(
        name="robustness", title="mIoU with a modality missing or damaged", columns=columns, rows=rows, figure="dots"
    )


def _cost(label: str, metric: str, decimals: int = 1) -> Column:
    return Column(label=label, metric=metric, decimals=decimals, gain=False, lower_is_better=True)


def across(tiny: bool) -> Table:
    """Trained on one data set, tested on another, on the classes that both have."""
    names = ("synthetic",) if tiny else cross_dataset.sweep.also_on
    columns = [Column(label=f"tested on {DATASETS[name].title}", on=name) for name in names]
    return Table(
        name="cross_dataset", title="Trained on one data set, tested on another", columns=columns,
        rows=_rows("cross_dataset", cross_dataset.sweep),
    )  # fmt: skip


def efficiency(tiny: bool) -> Table:
    """What training costs, and that inference costs nothing more."""
    columns = [
        _cost("parameters, M", "parameters"),
        _cost("multiply-adds, G", "multiply_adds"),
        _cost("latency, ms", "latency"),
        _cost("operations of a step, G", "training_operations"),
        _cost("a step, s", "step_seconds", decimals=2),
    ]
    return Table(
        name="efficiency", title="What CRM costs in training and in use", columns=columns,
        rows=_rows("overhead", overhead.sweep), compare="none",
    )  # fmt: skip


TABLES: Sequence[Callable[[bool], Table]] = (
    main, reproduction, per_class, day_night, components, masking_type, patch_size, mask_ratio, fusion, sharing,
    withstood, across, efficiency,
)  # fmt: skip
