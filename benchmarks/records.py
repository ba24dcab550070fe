"""How long looking at many records takes: crm status and crm tables over thousands of finished runs.

    python -m benchmarks.records [--runs 10000] [--seeds 5] [--folder DIR] [--json [FILE]]

The runs are generated: real configs and folders, INVENTED matrices of the synthetic set's six classes. The sweep is the
tiny form of an ablation with as many rows as it takes. Times are of fresh processes; cold is before any bootstrap is in
the cache.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS
from hashlib import sha256
from pathlib import Path

import numpy as np

from analysis.paper.cells import build_all
from analysis.paper.ledger import write
from analysis.paper.render import write as render
from analysis.paper.spec import Column, Row, Table
from analysis.paper.wanted import Form, Sweeps
from benchmarks.report import machine, machine_words, parser, show
from crm.cli.status import stand, status_text
from crm.conditions import CLEAN_TEST
from crm.config import flatten
from crm.confusion import Evaluation, save_evaluation
from crm.data.specs import DATASETS
from crm.fingerprint import code_parts, training_code
from crm.records import evaluation
from crm.sums import note
from crm.sweep import Sweep
from experiments.synthetic_tiny import config

IMAGES = 40
BASELINES = 10  # rows that bootstrapped gains are over: a table's groups


def sweep(runs: int, seeds: int) -> Sweep:
    """Rows that differ in one weight."""
    rows = {
        f"weight {number}": {"loss.complementary": round(0.001 * (number + 1), 6)} for number in range(runs // seeds)
    }
    return Sweep(title="Many rows", base=config, variants=rows, seeds=range(seeds), suite="clean")


def generate(folder: Path, found: Sweep) -> None:
    """Finished and evaluated runs, as the real writers leave them, without the waiting for the disk."""
    classes = list(DATASETS["synthetic"].classes)
    texts, parts = training_code(), code_parts()
    rng = np.random.default_rng(0)
    right = np.eye(len(classes), dtype=int) * 40
    names = np.array([f"{number:05d}" for number in range(IMAGES)])
    for cell in found.cells():
        place = folder / cell.id
        checkpoint = sha256(cell.id.encode()).hexdigest()
        place.mkdir(parents=True, exist_ok=True)
        files = {
            "config.json": {"schema": 1, "id": cell.id, "config": flatten(cell.config)},
            "provenance.json": {"commit": "0" * 40, "dirty": False, "code": "", "training_code": texts, "data": {}},
            "code.json": parts,
            "progress.json": {"step": cell.config.steps, "miou": 50.0, "best": 51.0},
            "result.json": {"id": cell.id, "steps": cell.config.steps, "train_seconds": 100.0, "parameters": 1000,
                            "seconds_per_step": 1.0, "checkpoints": {"last": {"sha256": checkpoint}}},
        }  # fmt: skip
        for name, value in files.items():
            (place / name).write_text(json.dumps(value))
        (place / "journal.jsonl").write_text(json.dumps({"event": "end", "outcome": "trained", "time": 0}) + "\n")
        confusion = (rng.integers(0, 6, (IMAGES, len(classes), len(classes))) + right).astype(np.int32)
        meta = {"condition": "test", "split": "test", "dataset": "synthetic", "classes": classes, "ignore_index": 255}
        meta |= {"selection": "last", "size": list(cell.config.data.size), "checkpoint_sha256": checkpoint}
        made = Evaluation(confusion, names, np.zeros(IMAGES, bool), None, meta)
        path = evaluation(place, "last", CLEAN_TEST)
        note(path, made, save_evaluation(path, made))


def look(folder: Path, runs: int, seeds: int) -> dict[str, float]:
    """In this process: seconds of the two looks, and its peak of memory in bytes."""
    began = time.perf_counter()
    found = sweep(runs, seeds)
    cells = found.cells()
    print(len(status_text(*stand("many", found, cells, folder / "runs"))), file=sys.stderr)
    status = time.perf_counter() - began
    began = time.perf_counter()
    by_row: dict = {}
    for cell in cells:
        by_row.setdefault(cell.variant, []).append(cell)
    rows = [Row(label=name, group=f"group {number // (len(by_row) // BASELINES + 1)}", sweep="many", variant=name)
            for number, name in enumerate(by_row)]  # fmt: skip
    table = Table(name="many", title="Many", columns=[Column(label="clean")], rows=rows)
    known = Sweeps(known={("many", ""): Form(name="many", sweep=found, cells=by_row)})
    built = build_all([table], folder / "runs", "", folder / "cache", sweeps=known)[0]
    states = {cell.state for cell in built.cells.values()}
    assert states == {"fresh"}, states
    write(built, folder / "out")
    render(built, folder / "out")
    tables = time.perf_counter() - began
    return {"status": status, "tables": tables, "bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def main() -> None:
    options = parser("records", __doc__)
    options.add_argument("--runs", type=int, default=10_000)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--folder", type=Path, help="Where the records are kept and found again. [default: a new one]")
    options.add_argument("--look", action="store_true", help=SUPPRESS)
    given = options.parse_args()
    if given.look:
        print(json.dumps(look(given.folder, given.runs, given.seeds)))
        return
    folder = given.folder or Path(tempfile.mkdtemp(prefix="crm-records-"))
    began = time.perf_counter()
    if not (folder / "runs").exists():
        generate(folder / "runs", sweep(given.runs, given.seeds))
    made = time.perf_counter() - began
    command = [
        sys.executable,
        "-m",
        "benchmarks.records",
        "--look",
        "--runs",
        str(given.runs),
        "--seeds",
        str(given.seeds),
    ]
    looks = {}
    for name in ("cold", "warm"):
        done = subprocess.run([*command, "--folder", str(folder)], capture_output=True, text=True, check=True)
        looks[name] = json.loads(done.stdout)
    about = machine()
    lines = [f"{machine_words(about)}; {given.runs} runs in {folder}, generated in {made:.0f} s"]
    for name, one in looks.items():
        lines.append(f"{name}: crm status {one['status']:.2f} s, crm tables {one['tables']:.1f} s, "
                     f"{one['bytes'] / 2**20:.0f} MiB")  # fmt: skip
    show(given, {**about, "runs": given.runs, "generated_seconds": made, **looks}, "\n".join(lines))


if __name__ == "__main__":
    main()
