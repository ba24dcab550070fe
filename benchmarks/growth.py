"""How time and memory grow: a step with batch and side, an evaluation with conditions, plan and status with runs.

    python -m benchmarks.growth [--points 5] [--rounds 3] [--only AXIS...] [--pictures FOLDER] [--json [FILE]]

A small network on synthetic scenes, one thread; every point is measured in a process of its own, after one turn that
warms up: processor seconds are the median of the rounds, memory is the peak that came on top of what the process had.
The exponent is the slope of a line through the logarithms: 1 is proportional, below it something is paid once. Pictures
are drawn into the folder (log-log, PNG and SVG), by default beside the results.
"""

import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.records import generate
from benchmarks.records import sweep as sweep_of
from benchmarks.report import host_kind, machine, machine_words, parser, say, show
from benchmarks.robustness import grid
from crm.cli.plan import plan_text, planned
from crm.cli.status import stand, status_text
from crm.config import override
from crm.data.dataset import open_run_split, open_split
from crm.data.loader import make_batch
from crm.data.specs import SYNTHETIC
from crm.evaluate import AT_ONCE, at_once, evaluate
from crm.machine import Machine
from crm.model.segmenter import build_segmenter
from crm.step import Trainer
from experiments.synthetic_small import config as small

SEEDS = 5
Work = Callable[[], object]  # what is measured, when everything that it needs is there


def main() -> None:
    options = parser("growth", __doc__)
    options.add_argument("--points", type=int, default=5, help="sizes of every axis")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--only", nargs="+", choices=AXES, default=list(AXES), metavar="AXIS", help=", ".join(AXES))
    options.add_argument("--pictures", type=Path, default=Path(__file__).parent / "results")
    given = options.parse_args()
    about, axes = machine(), {}
    for name in given.only:
        _, sizes, what = AXES[name]
        points = []
        for size in sizes[: given.points]:
            say(f"{name} {size}")
            points.append(apart(name, size, given.rounds))
        axes[name] = {"what": what, "points": points}
        axes[name] |= {f"{kind}_exponent": exponent(points, kind) for kind in ("seconds", "bytes")}
    draw(axes, given.pictures / f"growth-{host_kind()}")
    show(given, {**about, "axes": axes}, "\n".join([machine_words(about), *map(words, axes.items())]))


# ---------------------------------------------------------------------------------------------- what grows


def step_of(changes: dict[str, Any]) -> Work:
    """A training step of the small network."""
    config = override(small, {"data.train_images": 16, **changes})
    split = open_run_split(config.data, "train", None)
    trainer = Trainer(config, Machine(runs=Path()), split.spec, 1)
    trainer.begin()
    batch = make_batch(config, split, 0)
    return lambda: trainer.step(batch, 0)


def batch(size: int, scratch: Path) -> Work:
    return step_of({"batch": size})


def side(size: int, scratch: Path) -> Work:
    return step_of({"batch": 2, "data.size": (size, 3 * size // 2), "data.crop": (size, 3 * size // 2)})


def conditions(size: int, scratch: Path) -> Work:
    """Two images under a square grid of RGB x thermal conditions."""
    split = open_split("synthetic", "test", size=small.data.size, limit=2)
    split[:]
    model = build_segmenter(small.model, SYNTHETIC.num_classes).eval()
    every = grid(round(size**0.5))
    return lambda: list(evaluate(model, split, every, at_once(AT_ONCE, split.size, "cpu"), "cpu"))


def cells(size: int, scratch: Path) -> Work:
    """A plan where nothing is there yet."""

    def plan() -> str:
        found = sweep_of(size, SEEDS)
        return plan_text("many", found, planned(found, found.cells(), scratch), 2, scratch)

    return plan


def runs(size: int, scratch: Path) -> Work:
    """The status of finished runs."""
    maker = os.fork()  # in this process making them would leave memory behind, which looking could use
    if maker == 0:
        try:
            generate(scratch, sweep_of(size, SEEDS))
        finally:
            os._exit(0)
    os.waitpid(maker, 0)

    def look() -> str:
        found = sweep_of(size, SEEDS)
        return status_text(*stand("many", found, found.cells(), scratch))

    return look


AXES: dict[str, tuple[Callable[[int, Path], Work], tuple[int, ...], str]] = {
    "batch": (batch, (2, 4, 8, 16, 32), "training step: images of a batch"),
    "side": (side, (64, 96, 128, 192, 256), "training step: image height, pixels"),
    "conditions": (conditions, (1, 4, 16, 64, 256), "evaluation: conditions"),
    "cells": (cells, (250, 500, 1000, 2000, 4000), "crm plan: cells"),
    "runs": (runs, (125, 250, 500, 1000, 2000), "crm status: finished runs"),
}


# ---------------------------------------------------------------------------------------------- measuring


def apart(name: str, size: int, rounds: int) -> dict[str, float]:
    """One point, measured in a process that is forked for it: another's memory would hide what it needs."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(point, (name, size, rounds))


def point(name: str, size: int, rounds: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="crm-growth-") as scratch:
        work = AXES[name][0](size, Path(scratch))
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # lets the peak start anew
        seconds = []
        for _ in range(rounds + 1):
            began = time.process_time()
            work()
            seconds.append(time.process_time() - began)
        peak = resident("VmHWM") - before
    return {"size": size, "seconds": round(median(seconds[1:]), 5), "bytes": max(peak, 1)}


def resident(which: str) -> int:
    """Resident memory of this process, or its peak, bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


def exponent(points: list[dict[str, float]], kind: str) -> float | None:
    """Slope of the line through the logarithms; None of less than two points."""
    if len(points) < 2:
        return None
    logs = np.log([[one["size"], one[kind]] for one in points])
    return round(float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0]), 2)


# ---------------------------------------------------------------------------------------------- showing


def draw(axes: dict[str, Any], path: Path) -> None:
    """Time above, memory below, a column for every axis; the line is the fit."""
    figure, panels = plt.subplots(2, len(axes), figsize=(3.0 * len(axes), 5.4), squeeze=False, layout="constrained")
    units = {"seconds": ("processor seconds", 1.0), "bytes": ("peak memory on top, MiB", 2.0**20)}
    for column, one in enumerate(axes.values()):
        sizes = np.array([each["size"] for each in one["points"]], float)
        for panel, (kind, (label, unit)) in zip(panels[:, column], units.items(), strict=True):
            values = np.array([each[kind] for each in one["points"]]) / unit
            panel.loglog(sizes, values, "o", color="tab:blue")
            slope = one[f"{kind}_exponent"]
            if slope is not None:
                middle = np.exp(np.log(values).mean() - slope * np.log(sizes).mean())
                panel.loglog(sizes, middle * sizes**slope, "-", color="tab:gray", linewidth=1)
                panel.set_title(f"exponent {slope:.2f}", fontsize=9)
            panel.set_xticks(sizes, [f"{size:g}" for size in sizes], fontsize=7)
            panel.xaxis.set_minor_locator(NullLocator())
            low = values.min() / 2
            panel.set_ylim(low, max(2 * values.max(), 10 * low))  # a decade at least: what is flat looks flat
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_locator(NullLocator())
            panel.tick_params(labelsize=7)
            if not column:
                panel.set_ylabel(label, fontsize=9)
        panels[1, column].set_xlabel(one["what"], fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_name(path.name + ".png"), dpi=120)
    figure.savefig(path.with_name(path.name + ".svg"), metadata={"Date": None})
    plt.close(figure)


def words(axis: tuple[str, dict[str, Any]]) -> str:
    name, one = axis
    points = ", ".join(f"{each['size']:g}: {each['seconds']:.3g} s, {each['bytes'] / 2**20:.0f} MiB"
                       for each in one["points"])  # fmt: skip
    return f"{name}: time ~ n^{one['seconds_exponent']}, memory ~ n^{one['bytes_exponent']} ({points})"


if __name__ == "__main__":
    main()
