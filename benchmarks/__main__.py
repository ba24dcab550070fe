"""Runs benchmarks, each in a process of its own, keeps what they found, and writes the table.

    python -m benchmarks [NAME...] [--device cuda] [--quick] [--table] [--json]

What was found lies in benchmarks/results/<kind of machine>.json with date, commit, versions and how busy the machine
was otherwise; results of benchmarks that are not run now stay. benchmarks/README.md is written from these files.
Without names all are run but those that take long; with `--device cuda` those that a GPU is measured by, whose results
have a file of their own. `--quick` is a small form, to see that everything works: its results go to a folder of their
own, for the table is of whole ones.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.catalogue import BENCHMARKS, figures
from benchmarks.report import host_kind, machine, say
from crm.machine import Machine
from crm.names import chosen
from crm.provenance import PACKAGES, git
from crm.records import read_json, write_bytes, write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CODE = (":/", ":(top,exclude)benchmarks/results", ":(top,exclude)benchmarks/README.md")  # not what this writes itself
CALM = 0.1  # cores that others may use while a benchmark runs; with more its wall times are not to be trusted

INTRODUCTION = """# What it costs

Written by `make bench` from `results/`; nothing here is typed by hand. Each benchmark also runs alone, as
`python -m benchmarks.NAME` (`--help` says what it measures), and `python -m benchmarks NAME...` runs some of them.
Ratios of time are of both sides measured in turns in one process, ratios of memory of a process for each. *Others* is
how many cores other processes used meanwhile: beyond {calm} a line is marked **busy**, and its wall times are not to be
trusted; ratios and processor seconds suffer less.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="small forms, into results/quick")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table again")
    parser.add_argument("--json", action="store_true", help="print the results that there are now")
    given = parser.parse_args()
    try:
        gpu = gpu_name(given.device)
        can = {name: one for name, one in BENCHMARKS.items() if one.gpu or not gpu}
        for name in given.names:
            chosen("benchmark", name, can)
    except ValueError as error:
        parser.error(str(error))
    place = (RESULTS / "quick" if given.quick else RESULTS) / f"{host_kind(gpu)}.json"
    failed = []
    if not given.table:
        names = given.names or [name for name, benchmark in can.items() if not benchmark.by_name]
        failed = run_all(names, place, given.quick, given.device if gpu else "", gpu)
    if not given.quick:
        write_bytes(HERE / "README.md", page(RESULTS).encode())
    print(json.dumps(read_json(place), indent=1) if given.json else section(read_json(place) or {}))
    sys.exit(bool(failed))


def gpu_name(device: str) -> str:
    """The kind of GPU that `device` is, "" for a CPU; ValueError if it is not there."""
    asked = Machine(runs=Path(), device=device)
    if device == "cpu":
        return ""
    import torch  # noqa: PLC0415 - takes seconds

    asked.take_process()
    return torch.cuda.get_device_name(device)


def run_all(names: list[str], place: Path, quick: bool, device: str = "", gpu: str = "") -> list[str]:
    """Runs these one after another, writing what each found at once; the names of those that failed.

    Args:
        device: the GPU that is measured, and its name in `gpu`; "" is the CPU.
    """
    failed: list[str] = []
    for number, name in enumerate(names):
        before = {one: result["seconds"] for one, result in (read_json(place) or {}).get("benchmarks", {}).items()}
        left = [before.get(one) for one in names[number:]]
        known = sum(seconds for seconds in left if seconds is not None)
        unknown = f" and {left.count(None)} that were never run here" if None in left else ""
        say(f"[{number + 1}/{len(names)}] {name}; left: about {known / 60:.0f} min{unknown}")
        result = run(name, quick, device)
        if result is None:
            failed.append(name)
            say(f"{name} failed; its earlier result stays")
            continue
        if result["others"] > CALM:
            say(f"  others used {result['others']} cores meanwhile: do not trust its wall times")
        now = read_json(place) or {}
        about = {"cpu": machine()["cpu"], "cores": machine()["cores"], **({"gpu": gpu} if gpu else {})}
        write_json(place, {**about, "benchmarks": {**now.get("benchmarks", {}), name: result}})
    return failed


def run(name: str, quick: bool, device: str = "") -> dict[str, Any] | None:
    """What one benchmark found, with all that its figures rest on; None where it failed."""
    benchmark = BENCHMARKS[name]
    arguments = benchmark.quick if quick else benchmark.gpu if device else benchmark.arguments
    if device:
        arguments = (*arguments, "--device", device)
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": (git("rev-parse", "HEAD") or "unknown").strip(), "dirty": bool(git("diff", "HEAD", "--", *CODE)),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "arguments": list(arguments),
    }  # fmt: skip
    load, busy, began = os.getloadavg()[0], _busy(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "found.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json", str(file)]
        own = _own()
        if subprocess.run(command, cwd=HERE.parent, stdout=sys.stderr).returncode:
            return None
        found = read_json(file)
    seconds = time.monotonic() - began
    others = max(0.0, (_busy() - busy - (_own() - own)) / seconds)
    loads = [round(load, 2), round(os.getloadavg()[0], 2)]
    return {**about, "seconds": round(seconds, 1), "load": loads, "others": round(others, 2), "found": found}


def _busy() -> float:
    """Processor seconds that this machine has spent for anybody since it started."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


def _own() -> float:
    """Processor seconds of this process and of those that it has started, as far as they have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, kinds))


# ---------------------------------------------------------------------------------------------- the table


def page(results: Path) -> str:
    """README.md: a section for every kind of machine."""
    sections = [section(read_json(path)) for path in sorted(results.glob("*.json"))]
    return "\n".join([INTRODUCTION.format(calm=CALM), *sections])


def section(found: dict[str, Any]) -> str:
    """The figures of one kind of machine, and when and how busy it was for each."""
    if not found:
        return "Nothing was measured here yet."
    gpu, kind = found.get("gpu", ""), f"{found['cpu']}, {found['cores']} cores"
    lines = [f"## {f'{gpu}, with {kind}' if gpu else kind}", "", "| benchmark | figure | value | target |",
             "|---|---|--:|--:|"]  # fmt: skip
    when = ["| benchmark | date | commit | options | seconds | load | others |", "|---|---|---|---|--:|--:|--:|"]
    for name, benchmark in BENCHMARKS.items():
        if (one := found["benchmarks"].get(name)) is None:
            continue
        busy = " **busy**" if one["others"] > CALM else ""
        for what, value, target in figures(benchmark, one["found"], bool(gpu)):
            lines.append(f"| {name}{busy} | {what} | {value} | {target} |")
            busy = ""
        commit = one["commit"][:10] + (" and changes" if one["dirty"] else "")
        when.append(
            f"| {name} | {one['date']} | {commit} | {' '.join(one['arguments']) or '-'} | {one['seconds']:.0f} "
            f"| {one['load'][0]} to {one['load'][1]} | {one['others']} |"
        )
    versions = {words(one["versions"]) for one in found["benchmarks"].values()}
    return "\n".join([*lines, "", *when, "", *(f"Versions: {each}." for each in sorted(versions)), ""])


def words(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


if __name__ == "__main__":
    main()
