"""What this machine offers, what is missing, and what to do about it. Nothing is changed, nothing is downloaded.

Light: torch is imported only by the check that asks for its devices.
"""

import importlib.metadata as metadata
import os
import platform
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil

from crm.machine import cores

LOCK = Path(__file__).resolve().parents[1] / "constraints.txt"  # the tested versions; only a checkout has it
GIB = 2**30
ROOM = 5 * GIB  # bytes: below this a study of a few small runs may fill the disk
MEMORY = 4 * GIB  # bytes: below this a small run with its libraries may not fit
PATIENCE = 5.0  # seconds until whoever was asked counts as silent


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    status: str  # ok, warn or missing
    found: str
    remedy: str = ""  # what to do about it; empty where all is well
    needed: bool = True  # False for what only some work needs: a cluster, a real data set, a test


def diagnose(runs: Path, data: Path | None = None, tracking: str | None = None) -> list[Check]:
    """Every check, in the order of a table.

    `runs` is the folder of the run folders, `data` the data root, `tracking` the URI of the tracking store; without one
    it is the file `mlflow.db` among the runs.
    """
    return [
        _python(),
        _packages(),
        _versions(),
        _cpu(),
        _memory(),
        _devices(),
        _runs(runs),
        _git(),
        _slurm(),
        _tracking(tracking or f"sqlite:///{runs / 'mlflow.db'}"),
        *_datasets(data),
        _program("chromium", ("chromium", "chromium-browser", "google-chrome"), "the test of the report's page"),
        _program("tex", ("pdflatex", "tectonic"), "the test that LaTeX tables compile"),
    ]


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}"
    if sys.platform != "linux":
        return Check(name="python", status="warn", found=found, remedy="crm is developed and tested on Linux")
    return Check(name="python", status="ok", found=found)


def _packages() -> Check:
    """Whether all direct dependencies are there."""
    install = "make setup, or pip install -c constraints.txt -e ."
    try:
        required = [line for line in metadata.requires("crm-study") or [] if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        return Check(name="packages", status="missing", found="crm is imported but not installed", remedy=install)
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required]
    if absent := [name for name in names if _version(name) is None]:
        return Check(name="packages", status="missing", found=f"not installed: {', '.join(absent)}", remedy=install)
    return Check(name="packages", status="ok", found=f"all {len(names)} direct dependencies")


def _versions() -> Check:
    """Whether what is installed has the versions that were tested."""
    if not LOCK.exists():
        return Check(name="versions", status="ok", found="no list of tested versions outside a checkout")
    pins = dict(line.split("==") for line in LOCK.read_text().split())
    present = {name: found for name in pins if (found := _version(name)) is not None}
    # A local part, as in 2.15.0+cpu, names the build, not the version.
    other = [name for name, found in present.items() if found.partition("+")[0] != pins[name]]
    found = f"{len(present) - len(other)} of {len(present)} packages as tested"
    if not other:
        return Check(name="versions", status="ok", found=found)
    named = ", ".join(f"{name} {present[name]} (tested {pins[name]})" for name in other)
    remedy = "fine if `make test` passes; `make setup` in a fresh .venv installs the tested versions"
    return Check(name="versions", status="warn", found=f"{found}; not: {named}", remedy=remedy)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> Check:
    load, mine = os.getloadavg()[0], cores()
    found = f"{mine} of {psutil.cpu_count()} cores usable, load {load:.1f}"
    if load > 1.5 * mine:
        return Check(name="cpu", status="warn", found=found, remedy="others are using this machine: runs will be slow")
    return Check(name="cpu", status="ok", found=found)


def _memory() -> Check:
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < MEMORY:
        return Check(name="memory", status="warn", found=found, remedy="run fewer at once: --workers 1")
    return Check(name="memory", status="ok", found=found)


def _devices() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        remedy = "make setup installs it; see the Makefile for a build without CUDA"
        return Check(name="devices", status="missing", found=f"torch does not import: {error}", remedy=remedy)
    build = f"torch {torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    if torch.cuda.is_available():
        each = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{one.name} ({one.total_memory / GIB:.0f} GiB)" for one in each)
        return Check(name="devices", status="ok", found=f"{build}; {names}")
    if shutil.which("nvidia-smi"):
        remedy = "there is a driver but torch sees no GPU: compare `nvidia-smi` with the CUDA version of torch"
        return Check(name="devices", status="warn", found=f"{build}; CPU only", remedy=remedy)
    return Check(name="devices", status="ok", found=f"{build}; CPU only")


def _runs(runs: Path) -> Check:
    """Room at the runs folder, and whether this user can write there, tried with a file that is removed at once."""
    existing = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    made = "" if existing == runs.absolute() else " (not made yet)"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        remedy = f"name a folder you may write to with --runs, or CRM_HOME: {error.strerror}"
        return Check(name="runs", status="missing", found=f"{runs}{made}: cannot write in {existing}", remedy=remedy)
    free = shutil.disk_usage(existing).free
    found = f"{runs}{made}: {free / GIB:.0f} GiB free"
    if free < ROOM:
        return Check(name="runs", status="warn", found=found, remedy="make room, or use --runs on another disk")
    return Check(name="runs", status="ok", found=found)


def _answer(*command: str) -> tuple[bool, str]:
    """Whether a program succeeded in time, and its first line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {PATIENCE:g} s"
    except OSError as error:
        return False, str(error)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[0] if lines else ""


def _git() -> Check:
    if shutil.which("git") is None:
        remedy = "install git: without it a run's provenance has no commit"
        return Check(name="git", status="warn", found="not found", remedy=remedy)
    return Check(name="git", status="ok", found=_answer("git", "--version")[1])


def _slurm() -> Check:
    commands = ("sbatch", "squeue", "sacct", "scancel")
    absent = [name for name in commands if shutil.which(name) is None]
    if len(absent) == len(commands):
        remedy = "only for a cluster: log in to a node that has Slurm's commands"
        return Check(name="slurm", status="missing", found="not found", remedy=remedy, needed=False)
    version = _answer("squeue" if "squeue" not in absent else "sbatch", "--version")[1]
    if absent:
        remedy = "install the rest of Slurm's client commands (Debian: slurm-client)"
        found = f"{version}, without {', '.join(absent)}"
        return Check(name="slurm", status="warn", found=found, remedy=remedy, needed=False)
    answers, said = _answer("squeue", "--noheader", "--me")
    if not answers:
        remedy = "the commands are there but the controller does not answer: ask your administrator"
        return Check(name="slurm", status="warn", found=f"{version}: {said}", remedy=remedy, needed=False)
    return Check(name="slurm", status="ok", found=version, needed=False)


def _tracking(uri: str) -> Check:
    """Whether the tracking store answers; nothing is created."""
    parts = urlsplit(uri)
    if parts.scheme == "sqlite":
        return _sqlite(Path(uri.removeprefix("sqlite:///")))
    place = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"  # never a password
    try:
        if parts.scheme in ("http", "https"):
            with urlopen(f"{place}{parts.path.rstrip('/')}/health", timeout=PATIENCE):
                pass
        elif parts.scheme.startswith("postgresql"):
            if _version("psycopg2-binary") is None and _version("psycopg2") is None:
                remedy = "pip install -c constraints.txt -e '.[postgres]'"
                return Check(name="tracking", status="missing", found=f"{place}: no driver", remedy=remedy)
            with socket.create_connection((parts.hostname or "localhost", parts.port or 5432), timeout=PATIENCE):
                pass
        else:
            remedy = "give a sqlite:///FILE, http(s)://HOST:PORT or postgresql+psycopg2:// URI"
            return Check(name="tracking", status="warn", found=f"{uri.split('@')[-1]}: unknown form", remedy=remedy)
    except (URLError, OSError) as error:
        remedy = "start the server or correct MLFLOW_TRACKING_URI; runs never wait for it and are mirrored later"
        return Check(name="tracking", status="warn", found=f"{place} does not answer: {error}", remedy=remedy)
    return Check(name="tracking", status="ok", found=f"{place} answers")


def _sqlite(file: Path) -> Check:
    if not file.exists():
        return Check(name="tracking", status="ok", found=f"{file}: made when the first run is mirrored")
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE)) as store:
            (count,) = store.execute("select count(*) from runs").fetchone()
    except sqlite3.Error as error:
        remedy = "move the file away: the mirror is made anew from the run folders"
        return Check(name="tracking", status="warn", found=f"{file}: {error}", remedy=remedy)
    return Check(name="tracking", status="ok", found=f"{file}: {count} runs, {file.stat().st_size / 2**20:.0f} MiB")


def _datasets(data: Path | None) -> Iterator[Check]:
    from crm.data.files import locate
    from crm.data.specs import DATASETS

    for spec in DATASETS.values():
        name = f"data {spec.name}"
        if spec.layout == "generated":
            yield Check(name=name, status="ok", found="generated, needs no files", needed=False)
            continue
        try:
            folder = locate(spec, data)
        except FileNotFoundError:
            where = f"not below {data}" if data else "no data folder given"
            yield Check(name=name, status="missing", found=where, remedy=f"{spec.get}; then --data", needed=False)
        except OSError as error:
            remedy = "give yourself the right to read it"
            yield Check(name=name, status="missing", found=str(error), remedy=remedy, needed=False)
        else:
            yield Check(name=name, status="ok", found=str(folder), needed=False)


def _program(name: str, commands: tuple[str, ...], use: str) -> Check:
    found = next((path for command in commands if (path := shutil.which(command))), None)
    if found is None:
        remedy = f"only for {use}, which is skipped without it"
        return Check(name=name, status="missing", found="not found", remedy=remedy, needed=False)
    return Check(name=name, status="ok", found=found, needed=False)
