"""Verdicts of smoke tests: which configurations work with which code, and how the others fail."""

from collections.abc import Mapping
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import Any

from crm.cluster.folder import Submission, SweepFolder
from crm.config import STANDARD, Config, difference, seeded
from crm.machine import NUMERICS
from crm.records import read_json, write_json


def smoke_key(config: Config, submission: Submission) -> str:
    """What one verdict is about: a configuration but for its seed, the code, and how it is computed."""
    how = {name: submission.machine[name] for name in NUMERICS} | {
        "processes": submission.resources["nodes"] * submission.resources["tasks"]
    }
    settings = difference(seeded(config, 0), STANDARD)
    text = dumps([settings, how, Path(submission.snapshot).name], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:12]


def record_smoke(folder: SweepFolder, key: str, run: str, failure: Mapping[str, Any] | None) -> None:
    write_json(_path(folder, key), {"run": run, "passed": failure is None, **(failure or {})})


def verdict(folder: SweepFolder, key: str) -> dict[str, Any] | None:
    """`passed`, and where it is false `kind`, `reason`, `traceback`; None where there was no test."""
    return read_json(_path(folder, key))


def forget(folder: SweepFolder, key: str) -> None:
    """The configuration is to be tested again."""
    _path(folder, key).unlink(missing_ok=True)


def _path(folder: SweepFolder, key: str) -> Path:
    return folder.path / "smoke" / f"{key}.json"
