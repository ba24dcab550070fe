"""Where a run's numbers came from: commit, code, versions, data, hardware. Torch-free."""

import json
import platform
import subprocess
import sys
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from crm.config import SCHEMA
from crm.fingerprint import code_parts, training_code

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "pillow", "safetensors")
SOURCES = Path(__file__).resolve().parent
SNAPSHOT = "SNAPSHOT.json"  # in a copy of the code that was taken for jobs (crm.cluster.snapshot)


def provenance(data: dict[str, Any], weights: dict[str, Any], device: str) -> dict[str, Any]:
    """What is written once, by the first attempt; "diff" and "code_parts" are for files of their own.

    Args:
        data: of the splits used.
        weights: of what training starts from.
    """
    return {
        "schema": SCHEMA,
        **source(),
        "training_code": training_code(),
        "code_parts": code_parts(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "data": data,
        "weights": weights,
        "hardware": {
            "cpu": cpu(),
            "cores": psutil.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "device": device,
        },
        "command": sys.argv,
    }


def source() -> dict[str, Any]:
    """Commit and uncommitted changes of the repository the code stands in or was copied from, and a hash of the code.

    The hash is over the package's own .py files, so it is there without git too.
    """
    code = sha256()
    for path in sorted(SOURCES.rglob("*.py")):
        code.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    copied = SOURCES.parent / SNAPSHOT
    if copied.is_file():  # git would speak of whatever repository the copy lies in
        commit = json.loads(copied.read_text())["commit"]
        diff = (copied.parent / "uncommitted.diff").read_text()
    else:
        commit, diff = (git("rev-parse", "HEAD") or "unknown").strip(), git("diff", "HEAD") or ""
    return {"commit": commit, "dirty": bool(diff), "diff": diff, "code": code.hexdigest()[:16]}


def git(*arguments: str, at: Path = SOURCES) -> str | None:
    """What git says there, or None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(at), *arguments], capture_output=True, text=True, check=True, errors="replace"
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def cpu() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
