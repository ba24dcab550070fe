"""A copy of the project with sweeps of seconds, as a user of a cluster has it; what finished runs are compared by."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from crm.checkpoint import load_checkpoint
from crm.cluster.folder import SweepFolder
from crm.cluster.snapshot import ROOT, tracked
from crm.cluster.view import Look, Seen, look
from crm.confusion import load_evaluation
from crm.records import claims, journal, raw_lines, read_json
from tests.slurm.cluster import until

SLOW = 240.0  # seconds; a deadline for a run of seconds, on a machine where others work too

SWEEP = '''"""{title} Seconds each; the one row of both sweeps is the same run."""

from crm.config import override
from crm.sweep import Sweep
from experiments.synthetic_tiny import config
from sweeps import PLAIN

BASE = override(
    config,
    {{
        "data.train_images": 8, "data.val_images": 2, "data.test_images": 2, "batch": 2, "loss.points": 32,
        "model.drop_path": 0.1, "steps": 80, "val_every": 20,
    }},
)
OTHER = {{**PLAIN, "masking.kind": "modality_dropout", "loss.fused": 0.0, "loss.masked": 1.0}}
sweep = Sweep(title="{title}", base=BASE, variants={variants}, seeds=(0, 1), suite="clean")
'''
SWEEPS = {"quick": '{"plain": PLAIN, "CRM": {}}', "other": '{"plain": PLAIN, "dropout": OTHER}'}

# one CPU and the thread that goes with it, so that all runs of a cell have equal numerics wherever they are made
RESOURCES = {"device": "cpu", "cpus": 1, "memory_gb": 1.5, "minutes": 15, "reserve_seconds": 5, "warning_seconds": 10}


class Project:
    """The project in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in tracked(ROOT):
            if name.partition("/")[0] in ("crm", "experiments", "sweeps", "analysis"):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes((ROOT / name).read_bytes())
        for name, variants in SWEEPS.items():
            (root / "sweeps" / f"{name}.py").write_text(SWEEP.format(title=f"{name}?", variants=variants))

    def home(self, path: Path) -> "Home":
        """A new place for runs, with a settings file for this cluster."""
        path.mkdir(parents=True, exist_ok=True)
        return Home(self, path)


class Home:
    """Where the runs of one test are, and the command line that makes them."""

    def __init__(self, project: Project, path: Path) -> None:
        self.project, self.path = project, path
        self.configure()

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    def configure(self, **changes: Any) -> None:
        """Writes the settings file, as a user would."""
        values = {**RESOURCES, **changes}
        (self.path / "cluster.toml").write_text(
            "".join(f"{key} = {json.dumps(each)}\n" for key, each in values.items())
        )

    # ------------------------------------------------------------------------------------------ the command

    def start(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """The command, begun."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CRM_", "COV_"))}
        own = {"CRM_HOME": str(self.path), "PYTHONPATH": str(self.project.root), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "crm", *arguments], cwd=self.project.root, env={**kept, **own, **(env or {})},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def crm(self, *arguments: str, code: int = 0, env: Mapping[str, str] | None = None) -> str:
        """What the command prints, errors at the end; it must end with this code, and never with a traceback."""
        process = self.start(*arguments, env=env)
        out, err = process.communicate(timeout=SLOW)
        assert process.returncode == code, f"crm {' '.join(arguments)}: {process.returncode}\n{out}{err}"
        assert "Traceback" not in err, err
        return out + err

    def submit(self, *more: str, name: str = "quick", smoke: bool = False, code: int = 0, **options: Any) -> str:
        """`crm sweep` on the cluster, without a smoke test unless it is asked for."""
        arguments = ["sweep", name, "--cluster", "slurm", "--yes", "--machine", "checkpoint_every=5", *more]
        return self.crm(*arguments, *([] if smoke else ["--no-smoke"]), code=code, **options)

    def status(self, *more: str, name: str = "quick") -> dict[str, dict[str, Any]]:
        """What `crm status` says of every cell, by label."""
        lines = json.loads(self.crm("status", name, "--json", *more))
        return {f"{line['variant']}/{line['seed']}": line for line in lines}

    # ------------------------------------------------------------------------------------------ looking

    def look(self, name: str = "quick") -> Look:
        """The sweep as it stands, without the cost of the command."""
        folder = SweepFolder.of(self.runs, name)
        asked = folder.asked()
        assert asked is not None
        return look(folder, asked)

    def seen(self, label: str, name: str = "quick") -> Seen:
        return next(seen for seen in self.look(name).cells if seen.label == label)

    def states(self, name: str = "quick") -> dict[str, str]:
        return {seen.label: seen.name for seen in self.look(name).cells}

    def in_state(self, state: str, labels: Sequence[str] = (), name: str = "quick", seconds: float = SLOW) -> None:
        """Waits until these cells, or all, are in a state."""

        def there() -> bool:
            states = self.states(name)
            return all(states[label] == state for label in labels or states)

        until(there, f"{', '.join(labels) or 'all'} to be {state}", seconds, self.story)

    def done(self, *labels: str, name: str = "quick", seconds: float = SLOW) -> None:
        self.in_state("done", labels, name, seconds)

    def at_step(self, label: str, step: int, name: str = "quick") -> Seen:
        """Waits until a cell is running and has gone so far."""

        def there() -> Seen | None:
            seen = self.seen(label, name)
            return seen if seen.name == "running" and seen.files.step >= step and seen.files.holder else None

        return until(there, f"step {step} of {label}", SLOW, self.story)

    def folder(self, label: str, name: str = "quick") -> Path:
        return self.runs / self.seen(label, name).id

    def attempts(self, label: str) -> list[dict[str, Any]]:
        return claims(self.folder(label))

    def endings(self, label: str) -> list[str]:
        """How the attempts at a cell ended, in the order in which that was written: done, or a kind of failure."""
        lines = [line for line in raw_lines(self.folder(label) / "journal.jsonl") if line["event"] == "end"]
        return [line["outcome"] if line["outcome"] == "done" else line["kind"] for line in lines]

    def story(self) -> str:
        """What has happened, for the message of a test that fails."""
        told = []
        for path in sorted(self.runs.glob("*/journal.jsonl")):
            lines = [line for line in raw_lines(path) if line["event"] in ("attempt", "end", "retry")]
            told.append(f"{path.parent.name}: {[{k: v for k, v in line.items() if k != 'numerics'} for line in lines]}")
        for path in sorted(self.runs.glob(".sweeps/*/submissions/*.json")):
            told.append(path.read_text())
        for path in (*self.runs.glob("*/log.txt"), *self.runs.glob(".sweeps/*/jobs/*/*_log.out")):
            told.append(f"{path}:\n{path.read_text(errors='replace')[-1500:]}")
        jobs = subprocess.run(["squeue", "-t", "all"], capture_output=True, text=True)
        return "\n".join([*told, jobs.stdout, jobs.stderr])


def final(folder: Path) -> dict[str, Any]:
    """What two runs of a cell are compared by: everything that is not a time, a place or a number of attempts."""
    checkpoints = {}
    for path in sorted((folder / "checkpoints").glob("*.safetensors")):
        if path.stem.endswith(".previous"):
            continue
        found = load_checkpoint(path)
        digest = sha256()
        for part in ("weights", "trained", "optimizer"):
            for key, tensor in sorted(getattr(found, part).items()):
                digest.update(key.encode() + tensor.numpy().tobytes())
        checkpoints[path.stem] = (digest.hexdigest(), found.meta)
    lines = [line for line in journal(folder) if line["event"] in ("train", "val", "test")]
    changing = ("time", "seconds", "train_seconds", "seconds_per_step", "attempts", "images_per_second", "memory_gb")
    return {
        "checkpoints": checkpoints,
        "journal": [{key: value for key, value in line.items() if key not in changing} for line in lines],
        "evaluations": {
            str(path.relative_to(folder)): sha256(
                np.ascontiguousarray(load_evaluation(path).confusion).tobytes()
            ).hexdigest()
            for path in sorted(folder.glob("evals/**/*.npz"))
        },
        "result": {key: value for key, value in read_json(folder / "result.json").items() if key not in changing},
    }
