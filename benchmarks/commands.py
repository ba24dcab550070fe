"""How long a person waits for the command: help, and a sweep of ten thousand cells planned, looked at and submitted.

    python -m benchmarks.commands [--cells 10000] [--finished 9000] [--rounds 3] [--json [FILE]]

Every time is of a fresh process, start-up included, in wall and in processor seconds, median over the rounds. Finished
runs are generated as `benchmarks.records` does. Submission goes to small stand-ins for sbatch, squeue, sacct, scontrol
and sinfo, which note that they were called and take everything: what is counted is calls of a scheduler, for a small
and for the whole sweep, in arrays of at most 1001 elements as Slurm has them by default.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.records import generate, sweep
from benchmarks.report import machine, machine_words, parser, say, show

SEEDS = 5
CHUNK = 1001  # MaxArraySize of a Slurm that nobody has configured
COMMAND = "import sys, sweeps; sweeps.__path__.append(sys.argv.pop(1)); from crm.cli import main; main()"

# The sweep of benchmarks.records, in a module that loads nothing else.
MODULE = """
from crm.sweep import Sweep
from experiments.synthetic_tiny import config

rows = {{f"weight {{n}}": {{"loss.complementary": round(0.001 * (n + 1), 6)}} for n in range({rows})}}
sweep = Sweep(title="Many rows", base=config, variants=rows, seeds=range({seeds}), suite="clean")
"""
STAND_INS = {
    "sbatch": 'echo "Submitted batch job $(wc -l < "$CALLS")"',
    "scontrol": f'echo "MaxArraySize = {CHUNK}"; echo "MaxJobCount = 1000000"',
    "sinfo": "echo debug",
    **dict.fromkeys(("squeue", "sacct", "scancel", "srun"), ":"),
}


def main() -> None:
    options = parser("commands", __doc__)
    options.add_argument("--cells", type=int, default=10_000)
    options.add_argument("--finished", type=int, default=9_000)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    about = {**machine(), "cells": given.cells, "finished": given.finished, "rounds": given.rounds}
    with tempfile.TemporaryDirectory(prefix="crm-commands-") as scratch:
        found = measure(Path(scratch), given.cells, given.finished, given.rounds)
    show(given, {**about, **found}, table(about, found))


def measure(scratch: Path, cells: int, finished: int, rounds: int) -> dict[str, Any]:
    """Seconds of the commands, and calls of the scheduler."""
    say("crm --help")
    found: dict[str, Any] = {"help": timed(["--help"], scratch, 2 * rounds + 1)}
    say(f"generating {finished} finished runs")
    write_module(scratch, cells)
    generate(scratch / "runs", sweep(finished, SEEDS))
    for name in ("plan", "status"):
        say(f"crm {name} of {cells} cells")
        found[name] = timed([name, "many", "--runs", str(scratch / "runs")], scratch, rounds)
        assert f"{finished} done" in found[name]["said"] or f"{cells - finished} of {cells} runs" in found[name]["said"]
    few = 2 * CHUNK // SEEDS * SEEDS
    for name, count in (("submit_few", few), ("submit", cells)):
        say(f"submitting {count} cells")
        place = scratch / name
        write_module(place, count)
        found[name] = submitted(place)
        assert found[name]["calls"]["sbatch"], found[name]["said"]
        found[name] |= {"cells": count, "arrays": -(-count // CHUNK)}
    more = found["submit"]["arrays"] - found["submit_few"]["arrays"]
    grown = sum(found["submit"]["calls"].values()) - sum(found["submit_few"]["calls"].values())
    found["calls_per_array"] = round(grown / more, 2) if more else None
    return {name: {key: value for key, value in one.items() if key != "said"} if isinstance(one, dict) else one
            for name, one in found.items()}  # fmt: skip


def write_module(folder: Path, cells: int) -> None:
    (folder / "sweeps").mkdir(parents=True, exist_ok=True)
    (folder / "sweeps" / "many.py").write_text(MODULE.format(rows=cells // SEEDS, seeds=SEEDS))


def timed(arguments: list[str], folder: Path, rounds: int, **variables: str) -> dict[str, Any]:
    """Wall and processor seconds of one call of the command, and what it said."""
    walls, processors, said = [], [], ""
    for _ in range(rounds):
        with tempfile.TemporaryFile("w+") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(folder / "sweeps"), *arguments],
                stdout=output, stderr=output, env={**os.environ, **variables},
            )  # fmt: skip
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            walls.append(time.perf_counter() - began)
            processors.append(used.ru_utime + used.ru_stime)
            output.seek(0)
            said = output.read()
        if process.returncode:
            raise RuntimeError(f"crm {' '.join(arguments)} ended with {process.returncode}: {said[-2000:]}")
    return {"wall": round(median(walls), 3), "cpu": round(median(processors), 3), "said": said}


def submitted(folder: Path) -> dict[str, Any]:
    """One submission to the stand-ins: its seconds, and how often each was called."""
    programs, calls = folder / "bin", folder / "calls"
    programs.mkdir()
    calls.touch()
    for name, does in STAND_INS.items():
        path = programs / name
        path.write_text(f'#!/bin/sh\necho {name} >> "$CALLS"\n{does}\n')
        path.chmod(0o755)
    arguments = ["sweep", "many", "--cluster", "slurm", "--slurm", "device=cpu", "--held", "--yes", "--no-track"]
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    found = timed([*arguments, "--runs", str(folder / "runs")], folder, 1,
                  PATH=path, CALLS=str(calls), CRM_HOME=str(folder))  # fmt: skip
    return {**found, "calls": dict(Counter(calls.read_text().split()))}


def table(about: dict[str, Any], found: dict[str, Any]) -> str:
    lines = [f"{machine_words(about)}; {about['cells']} cells, {about['finished']} finished",
             f"{'':24}{'wall s':>8}{'cpu s':>8}"]  # fmt: skip
    names = {"help": "crm --help", "plan": "crm plan", "status": "crm status", "submit": "crm sweep, submitting"}
    lines += [f"{words:24}{found[name]['wall']:8.2f}{found[name]['cpu']:8.2f}" for name, words in names.items()]
    for one in (found["submit_few"], found["submit"]):
        calls = ", ".join(f"{count} {name}" for name, count in one["calls"].items())
        lines.append(f"{one['cells']} cells in {one['arrays']} arrays: {calls}")
    return "\n".join([*lines, f"calls of the scheduler for one array more: {found['calls_per_array']}"])


if __name__ == "__main__":
    main()
