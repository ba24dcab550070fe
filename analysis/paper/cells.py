"""A table's spec and the run folders become a table with its numbers, each cell in one of the states.

    fresh             every seed has its number, and nothing has changed under it
    stale             something has, or a number may not be used (why stands in the reason)
    partial           some seeds have their number
    running, queued   none has, and some are on their way
    failed            none has, and some have failed
    missing           none has, and nothing is on its way
    published only    no run of ours is meant; another paper's number stands there

What is compared is compared at equal seed and on equal images; everything else is refused and said.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from analysis.paper import lacking, statistics
from analysis.paper.evidence import ON_ITS_WAY, Contribution, Records
from analysis.paper.metrics import parse
from analysis.paper.result import Built, Cell, Interval, Reference, Run, column_id
from analysis.paper.spec import Table
from analysis.paper.wanted import Sweeps, Wanted, wanted
from analysis.published import Published, results
from analysis.stats import Cache, against_published, over_seeds
from analysis.stats.published import OTHERWISE
from crm.config import difference
from crm.data.specs import DATASETS
from crm.recipes import released

Key = tuple[str, str]  # ids of row and column
Found = Mapping[Key, Sequence[Contribution]]
USED = ("fresh", "stale", "partial")  # states of cells that may have a number


def build(table: Table, records: Records, sweeps: Sweeps, cache: Cache) -> Built:
    """The table as the run folders have it. Changes nothing but the cache."""
    asked = wanted(table, sweeps)
    found = {key: [records.contribution(want, cell) for cell in want.cells] for key, want in asked.items()}
    notes = [*table.notes]
    found = _distinct(_one_protocol(asked, found))
    cells = {key: _cell(key, asked[key], found[key]) for key in asked}
    gains = statistics.compared(table, asked, found, cells, cache)
    notes += gains.notes
    cells = {key: replace(cell, **gains.of(key)) for key, cell in cells.items()}
    notes += list(dict.fromkeys(records.troubles))
    work = lacking.work(asked, found, cells)
    return Built(
        table=table, form=sweeps.form, cells=cells, notes=notes, work=work,
        commands=list(dict.fromkeys(one.command for one in work)),
    )  # fmt: skip


def build_all(
    tables: Sequence[Table], runs: Path, form: str, cache: Path, check: bool = False, sweeps: Sweeps | None = None
) -> list[Built]:
    """Several tables, each run folder read once.

    Args:
        form: "" or "tiny", of the sweeps.
        cache: the folder where bootstraps are remembered.
        check: whether evaluations are read whole, to see whether one was edited.
        sweeps: where the caller knows them already.
    """
    records, known = Records(runs, check), Cache(cache)
    sweeps = sweeps or Sweeps(form)
    return [build(table, records, sweeps, known) for table in tables]


# ---------------------------------------------------------------------------------------------- what is refused


def _one_protocol(asked: Mapping[Key, Wanted], found: Found) -> Found:
    """Refuses runs that were evaluated on other images, classes or sizes than most of their column."""
    groups: dict[tuple, Counter] = {}
    for key, contributions in found.items():
        for one in contributions:
            if one.usable and one.protocol:
                groups.setdefault(_comparable(key, asked[key], one), Counter())[one.protocol] += 1

    def judged(key: Key, one: Contribution) -> Contribution:
        if not one.usable or not one.protocol:
            return one
        usual = groups[_comparable(key, asked[key], one)].most_common(1)[0][0]  # of equally many, the first
        if one.protocol == usual:
            return one
        return replace(one, refused=f"mixed protocols: {_differs(one.protocol, usual)}")

    return {key: [judged(key, one) for one in contributions] for key, contributions in found.items()}


def _comparable(key: Key, want: Wanted, one: Contribution) -> tuple:
    """What must have been evaluated alike: a column's runs on the same data at the same size."""
    data = one.cell.config.data
    return key[1], want.column.on or data.dataset, data.dataset, tuple(data.size), data.test_images


PROTOCOL = ("data set", "split", "classes", "data set trained on", "size", "number of images", "images")


def _differs(own: Sequence, usual: Sequence) -> str:
    for name, mine, theirs in zip(PROTOCOL, own, usual, strict=True):
        if mine != theirs:
            plain = name not in ("images", "classes")
            return f"it was evaluated with other {name} than the rest of the column" + (
                f" ({_plainly(mine)}, not {_plainly(theirs)})" if plain else ""
            )
    raise ValueError("they are the same")


def _plainly(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _distinct(found: Found) -> Found:
    """Refuses a run that is another seed's network once more: a copy is no evidence about another seed."""
    kept: dict[Key, list[Contribution]] = {}
    for key, contributions in found.items():
        seen: dict[str, int] = {}
        kept[key] = []
        for one in contributions:
            prints = [one.chain.get("checkpoint_sha256")]
            prints += [each["sha256"] for each in one.chain.get("evaluations", {}).values()]
            twin = next((seen[print_] for print_ in prints if print_ and print_ in seen), None)
            seen |= {print_: one.cell.seed for print_ in prints if print_ and print_ not in seen}
            if one.usable and twin is not None:
                why = f"a duplicate: it has the checkpoint or the evaluation of seed {twin}"
                one = replace(one, refused=why, mended="training")
            kept[key].append(one)
    return kept


# ---------------------------------------------------------------------------------------------- one cell


def _cell(key: Key, want: Wanted, found: Sequence[Contribution]) -> Cell:
    published = _published(want)
    if not want.cells:
        state = "published only" if published else "missing"
        reason = want.why_not or ("" if published else "nobody has published it")
        return Cell(row=key[0], column=key[1], state=state, reason=reason, published=_reference(published))
    state, reason = _state(found)
    values = {one.cell.seed: one.value for one in found if one.usable}
    estimate = over_seeds(list(values.values()))  # type: ignore[arg-type]
    interval = estimate.interval() if estimate.n > 1 else None
    return Cell(
        row=key[0],
        column=key[1],
        state=state,
        reason=reason,
        wanted=len(found),
        runs=[_run(want, one) for one in found],
        mean=estimate.mean if estimate.n else None,
        sd=estimate.sd if estimate.n > 1 else None,
        n=estimate.n,
        interval=interval and Interval(
            low=interval.low, high=interval.high, over=f"{interval.over}, this test set",
            method=f"t over {estimate.n} seeds",
        ),
        published=_reference(published, want, list(values.values())),
        waived="; ".join(dict.fromkeys(one.waived for one in found if one.waived)),
        protocol=protocol(want, found),
    )  # fmt: skip


def _state(found: Sequence[Contribution]) -> tuple[str, str]:
    """Of a cell, with the reason in words."""
    good = [one for one in found if (one.usable or one.absent) and not one.stale]
    bad = [(one, one.refused or one.stale) for one in found if one.refused or (one.stale and one.usable)]
    rest = [one for one in found if one not in good and not any(one is other for other, _ in bad)]
    if len(good) == len(found):
        absent = [(one, "evaluated, and nothing of it occurs in these images") for one in good if one.absent]
        return "fresh", "; ".join(_seeds(absent))
    told = _seeds([(one, why) for one, why in bad]) + _seeds([(one, _words(one)) for one in rest])
    reason = "; ".join(told)
    if bad:
        return "stale", reason
    if good:
        return "partial", reason
    for state, names in (("running", ("running", "suspended")), ("queued", ON_ITS_WAY), ("failed", ("failed",))):
        if any(one.state in names for one in rest):
            return state, reason
    return "missing", "" if all(one.state == "missing" and not one.reason for one in rest) else reason


def _words(one: Contribution) -> str:
    done = f" at {100 * one.share:.0f} %" if 0 < one.share < 1 else ""
    name = "trained" if one.state == "trained" and not one.reason else one.state
    if one.state == "trained" and one.reason:
        return one.reason
    return f"{name}{done}" + (f": {one.reason}" if one.reason else "")


def _seeds(told: Sequence[tuple[Contribution, str]]) -> list[str]:
    """Equal words once, with the seeds that they are about."""
    grouped: dict[str, list[int]] = {}
    for one, why in told:
        grouped.setdefault(why, []).append(one.cell.seed)
    return [f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} {why}" for why, seeds in grouped.items()]


def _run(want: Wanted, one: Contribution) -> Run:
    bad = one.refused or (one.stale if one.value is not None else "")
    return Run(
        sweep=want.name, variant=want.variant, seed=one.cell.seed, id=one.cell.id,
        state="stale" if bad else one.state, reason=bad or one.reason, share=one.share,
        value=one.value if one.usable else None, chain=one.chain,
    )  # fmt: skip


def protocol(want: Wanted, found: Sequence[Contribution]) -> str:
    """How the numbers of a cell were measured, in words."""
    config = want.cells[0].config
    recipe = "released recipe" if as_released(want) else "clean recipe"
    title = DATASETS[want.column.on or config.data.dataset].title
    if parse(want.column.metric).file:
        return f"{recipe}; {title}; {parse(want.column.metric).title}"
    conditions = [one.name for one in want.conditions]
    how = conditions[0] if len(conditions) == 1 else f"{want.column.reduce} of {len(conditions)} conditions"
    classes = next(
        (len(one.protocol[2]) for one in found if one.protocol),
        len(DATASETS[want.column.on or config.data.dataset].classes),
    )
    metric = parse(want.column.metric).title
    size = "x".join(map(str, config.data.size))
    return f"{recipe}; checkpoint {want.selection}; {title}, {how}, {size}; {metric}, {classes} classes with class 0"


def as_released(want: Wanted) -> bool:
    """Whether a cell's runs follow the released recipe in everything but the seed."""
    config = want.cells[0].config
    try:
        return not set(difference(released(config), config)) - {"seed"}
    except ValueError:  # the released code cannot do what this run does
        return False


# ---------------------------------------------------------------------------------------------- published numbers


def _published(want: Wanted) -> Published | None:
    key = want.row.published.get(column_id(want.column), want.row.published.get(want.column.label, ""))
    return results()[key] if key else None


def _reference(
    found: Published | None, want: Wanted | None = None, values: Sequence[float | None] = ()
) -> Reference | None:
    if found is None:
        return None
    verdict = ""
    if want is not None and values:
        judged = against_published(values, found.miou, _protocol_differs(found, want))  # type: ignore[arg-type]
        if judged is not None:
            verdict = f"{judged.verdict} ({judged.why})" if judged.verdict == OTHERWISE else judged.verdict
    return Reference(value=found.miou, source=found.source, protocol=f"checkpoint: {found.selection}", verdict=verdict)


def _protocol_differs(found: Published, want: Wanted) -> list[str]:
    """What is not the same there and here, in words."""
    config, differences = want.cells[0].config, []
    if (own := want.column.on or config.data.dataset) != found.dataset:
        differences.append(f"{DATASETS[own].title} here, {DATASETS[found.dataset].title} there")
    if "test" in found.selection and want.selection != "test_best":
        differences.append(f"the checkpoint is chosen on the test split there, {want.selection} here")
    elif "test" not in found.selection:
        differences.append("how its checkpoint was chosen is not known to be as here")
    if not as_released(want):
        differences.append("not the released recipe here")
    return differences
