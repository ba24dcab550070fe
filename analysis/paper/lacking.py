"""What a table lacks, as the fewest commands that make it: runs to train, evaluations to compute, costs to measure."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis.paper.evidence import EDITED, ON_ITS_WAY, Contribution
from analysis.paper.result import Cell
from analysis.paper.wanted import Wanted
from crm.conditions import SUITES

Key = tuple[str, str]
Kind = tuple[str, str, str, bool]  # sweep with its form, selection, rerun, whether it is evaluated alone


@dataclass(frozen=True, kw_only=True)
class Work:
    """Cells of one sweep that are to be done under one suite."""

    sweep: str  # with its form
    suite: str
    selection: str  # the checkpoint that is evaluated
    only: Sequence[str] = ()  # rows or row/seed; none: all
    labels: Sequence[str] = ()  # row/seed of all of them
    rerun: str = ""  # stale or all: what is there already is done anew
    evaluate: bool = False  # the trained runs are evaluated, and nothing is trained

    @property
    def command(self) -> str:
        """As a person types it."""
        if self.evaluate:
            words = ["crm", "evaluate", self.sweep, "--suite", self.suite, "--select", self.selection]
            words += ["--rerun", self.rerun] * bool(self.rerun)
        else:
            words = ["crm", "sweep", f"{self.sweep}+{self.suite}"]
            words += [word for pattern in self.only for word in ("--only", pattern)]
            words += ["--rerun", self.rerun] * bool(self.rerun)
        return shlex.join(words)


def work(
    asked: Mapping[Key, Wanted], found: Mapping[Key, Sequence[Contribution]], cells: Mapping[Key, Cell]
) -> list[Work]:
    """What is to be done, in the order of the table; what is on its way already is left out."""
    labels: dict[Kind, dict[str, None]] = {}
    conditions: dict[Kind, dict[str, None]] = {}
    wants: dict[str, Wanted] = {}
    for key, want in asked.items():
        if not cells[key].lacking or want.sweep is None:
            continue
        own = want.sweep.selection
        for one in found[key]:
            again = _rerun(one)
            if not again and (one.usable or one.absent or one.state in ON_ITS_WAY):
                continue
            wants[want.name] = want
            if again and one.mended == "evaluating":
                kinds: list[Kind] = [(want.name, want.selection, again, True)]
            else:
                kinds = [(want.name, own, again, False)]
                # a checkpoint that the sweep itself does not evaluate is there once the run is trained
                kinds += [(want.name, want.selection, "", True)] * (want.selection != own)
            for kind in kinds:
                labels.setdefault(kind, {})[one.cell.label] = None
                conditions.setdefault(kind, {}).update(dict.fromkeys(each.name for each in want.conditions))
    return [
        Work(
            sweep=kind[0], suite=suite, selection=kind[1], only=_patterns(wants[kind[0]], [*labels[kind]]),
            labels=[*labels[kind]], rerun=kind[2], evaluate=kind[3],
        )
        for kind in sorted(labels, key=lambda kind: kind[3])  # evaluated when trained
        for suite in cover([*conditions[kind]])
    ]  # fmt: skip


def _rerun(one: Contribution) -> str:
    """What has to be done anew for its number to be used."""
    if one.refused:
        return "stale" if EDITED in one.refused else "all"
    return "stale" if one.stale and one.value is not None else ""


def cover(conditions: Sequence[str]) -> list[str]:
    """The smallest suites that together hold these conditions; `clean` where none are needed.

    ValueError for a condition that no suite has.
    """
    left = dict.fromkeys(conditions)
    suites = {name: {one.name for one in members} for name, members in SUITES.items()}
    chosen: list[str] = []
    while left:
        whole = [name for name, members in suites.items() if left.keys() <= members]
        if whole:
            best = min(whole, key=lambda name: len(suites[name]))
        else:
            best = max((name for name in suites if name != "paper"), key=lambda name: len(left.keys() & suites[name]))
        if not left.keys() & suites[best]:
            raise ValueError(
                f"no suite has the condition {next(iter(left))!r}; crm.conditions.SUITES is where to add it"
            )
        if best == "paper" and (parts := _greedy(left, suites)):
            return chosen + parts
        chosen.append(best)
        left = {name: None for name in left if name not in suites[best]}
    return chosen or ["clean"]


def _greedy(wanted: Mapping[str, None], suites: Mapping[str, set[str]]) -> list[str]:
    """Suites other than `paper`, which has everything, that hold the conditions; the largest share first."""
    left, chosen = set(wanted), []
    while left:
        best = max(
            (name for name in suites if name != "paper"),
            key=lambda name: (len(left & suites[name]), -len(suites[name])),
        )
        if not left & suites[best]:
            return []
        chosen.append(best)
        left -= suites[best]
    return chosen


def _patterns(want: Wanted, labels: Sequence[str]) -> list[str]:
    """A row where all of its seeds are meant, else row/seed; none where all of the sweep is."""
    assert want.sweep is not None
    seeds = [str(seed) for seed in want.sweep.seeds]
    every = [f"{variant}/{seed}" for variant in want.sweep.variants for seed in seeds]
    if set(every) <= set(labels):
        return []
    patterns: dict[str, None] = {}
    for label in labels:
        row = label.rpartition("/")[0]
        patterns[row if all(f"{row}/{seed}" in labels for seed in seeds) else label] = None
    return [*patterns]
