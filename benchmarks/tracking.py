"""What the MLflow mirror costs a training process: steps per second with it on, off, and with a server that hangs.

    python -m benchmarks.tracking [--seconds 300] [--block 2] [--json [FILE]]

One process trains on one thread and journals every step, far more often than real runs do. Blocks of a few seconds
alternate, the order within each round at random: "off", "on", with a mirror into a new sqlite store, and "hang", with a
mirror to a server that takes connections and never answers. Each kind has a run folder of its own, which its steps are
journaled in, so a mirror has to send what came in its own blocks; in the others SIGSTOP holds it. Ratios are of blocks
of the same round, in steps per second of wall clock and of the training process's own CPU time; the load of the machine
is printed, for others may be at work on it.
"""

import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from benchmarks.report import machine as this_machine
from benchmarks.report import machine_words, parser, say, show
from crm.config import override
from crm.data.dataset import open_run_split
from crm.data.loader import batches
from crm.machine import Machine
from crm.records import append, claim, open_run
from crm.step import Trainer
from crm.tracking.listing import list_run
from crm.tracking.store import connect
from experiments.synthetic_tiny import config as base

KINDS = ("off", "on", "hang")
WARM_UP = 120.0  # seconds at most


def main() -> None:
    options = parser("tracking", __doc__)
    options.add_argument("--seconds", type=float, default=300.0, help="of measuring")
    options.add_argument("--block", type=float, default=2.0, help="seconds of one block")
    given = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(Path(scratch), given.seconds, given.block)
    show(given, found, table(found))


def measure(scratch: Path, seconds: float, block: float) -> dict[str, object]:
    """Everything the table shows."""
    config = override(base, {"steps": 1_000_000, "val_every": 0})
    machine = Machine(runs=scratch / "runs", log_every=1)
    folders, names = {}, {}
    for kind in KINDS:
        folders[kind] = folder = open_run(machine.runs, override(config, {"seed": KINDS.index(kind)}))
        mine = claim(folder, "benchmark")
        assert mine is not None
        append(folder, "attempt", token=mine.token, attempt=1, step=0)
        names[kind] = list_run(machine.runs, kind, config, folder.name).name
    split = open_run_split(config.data, "train", None)
    trainer = Trainer(config, machine, split.spec, max(1, len(split) // config.batch))
    trainer.begin()
    prepared = batches(config, split, 0, 0, trainer.places)

    deaf = socket.create_server(("127.0.0.1", 0))  # its system takes connections for it, and nobody answers
    uris = {
        "on": f"sqlite:///{scratch / 'mlflow.db'}",
        "hang": f"http://127.0.0.1:{deaf.getsockname()[1]}",
    }
    prepare_store(uris["on"], scratch)
    command = [sys.executable, "-m", "crm.tracking.process", "--runs", str(machine.runs), "--follow", str(os.getpid())]
    mirrors = {kind: subprocess.Popen([*command, names[kind], "--uri", uri]) for kind, uri in uris.items()}
    sent_file = folders["on"] / "mirror.json"
    speeds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    number, about = 0, this_machine()
    try:
        say("warming up, while the mirrors load MLflow and reach their stores")
        for kinds, length in ((None, WARM_UP), (KINDS, seconds)):
            until = time.monotonic() + length
            while time.monotonic() < until and not (kinds is None and sent_file.exists()):
                order = random.sample(KINDS, 3) if kinds else [None]
                for kind in order:
                    for each, process in mirrors.items():
                        process.send_signal(signal.SIGCONT if kind in (None, each) else signal.SIGSTOP)
                    began, spent, first = time.perf_counter(), time.process_time(), number
                    while time.perf_counter() - began < block:
                        step = trainer.step(next(prepared), number)
                        number += 1
                        append(
                            folders[kind or "on"], "train", step=number, total=step.total, terms=step.terms,
                            details=step.details, lr=step.lr, grad_norm=step.grad_norm, seconds=0.1, hidden=step.hidden,
                        )  # fmt: skip
                    steps = number - first
                    wall, own = time.perf_counter() - began, time.process_time() - spent
                    if kind is not None:
                        speeds[kind].append((steps / wall, steps / own))
                say(f"  {number} steps")
        used = {kind: psutil.Process(process.pid) for kind, process in mirrors.items()}
        costs = {kind: (sum(each.cpu_times()[:2]), each.memory_info().rss / 2**20) for kind, each in used.items()}
    finally:
        for process in mirrors.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        deaf.close()
    sent = json.loads(sent_file.read_text()) if sent_file.exists() else {}
    return {
        **about,
        "seconds": seconds, "block": block, "rounds": len(speeds["off"]), "steps": number,
        "lines_sent": max((cursor["lines"] for cursor in sent.values()), default=0),
        "steps_per_second": {kind: round(statistics.mean(one[0] for one in speeds[kind]), 2) for kind in KINDS},
        "wall": {kind: ratio(speeds, kind, 0) for kind in KINDS[1:]},
        "cpu_time": {kind: ratio(speeds, kind, 1) for kind in KINDS[1:]},
        "mirror": {
            kind: {"cpu_seconds": round(spent, 1), "memory_mib": round(memory)}
            for kind, (spent, memory) in costs.items()
        },
    }  # fmt: skip


def ratio(speeds: dict[str, list[tuple[float, float]]], kind: str, clock: int) -> dict[str, float]:
    """Of the speed with a mirror to the one without, over the rounds: median, mean and the mean's standard error."""
    each = [one[clock] / off[clock] for one, off in zip(speeds[kind], speeds["off"], strict=True)]
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("nan")
    return {
        "median": round(statistics.median(each), 4),
        "mean": round(statistics.mean(each), 4),
        "error": round(error, 4),
    }


def prepare_store(uri: str, scratch: Path) -> None:
    """Makes the store's tables in a process of its own: this one must not import MLflow."""
    process = os.fork()
    if process == 0:
        try:
            connect(uri, scratch / "runs")
        finally:
            os._exit(0)
    os.waitpid(process, 0)


def table(found: dict) -> str:
    lines = [
        f"{machine_words(found)}; {found['steps']} steps,",
        f"{found['rounds']} rounds of three blocks of {found['block']:.0f} s, {found['lines_sent']} lines in the store",
        "",
        "          steps/s   of off, wall clock         of off, own CPU time       mirror's CPU   memory",
    ]
    for kind in KINDS:
        text = f"{kind:8}{found['steps_per_second'][kind]:9.2f}"
        if kind != "off":
            for clock in ("wall", "cpu_time"):
                one = found[clock][kind]
                text += f"   {one['mean']:.4f} ± {one['error']:.4f} ({one['median']:.4f})"
            text += f"{found['mirror'][kind]['cpu_seconds']:12.1f} s {found['mirror'][kind]['memory_mib']:6} MiB"
        lines.append(text)
    return "\n".join([*lines, "", "mean of paired ratios ± its standard error (median)"])


if __name__ == "__main__":
    main()
