"""What the next attempt at a run is to do otherwise than the last (retries.json of its folder). Torch-free."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crm import failures
from crm.records import raw_lines, read_config, read_json, write_json


def retries(folder: Path) -> dict[str, Any]:
    """micro_batch (images), memory_gb, exclude (names of nodes): what an earlier attempt has taught, if anything."""
    return read_json(folder / "retries.json") or {}


def may_retry(folder: Path, kind: str, processes: int) -> bool:
    """Whether the policy allows another attempt at a run that has ended so."""
    batch, micro_batch = _batch(folder, processes), _micro_batch(folder)
    return failures.may_retry(raw_lines(folder / "journal.jsonl"), kind, batch, micro_batch)


def halve(folder: Path, processes: int) -> None:
    """The next attempt computes half as many images at once; the batch that a step sees stays the same."""
    smaller = failures.halved(_batch(folder, processes), _micro_batch(folder))
    teach(folder, {"micro_batch": smaller})


def teach(folder: Path, values: Mapping[str, Any]) -> None:
    write_json(folder / "retries.json", {**retries(folder), **values})


def _batch(folder: Path, processes: int) -> int:
    """Images of a step, of one process."""
    return max(1, read_config(folder).batch // processes)


def _micro_batch(folder: Path) -> int:
    """How many of them the last attempt computed at once; 0 is all."""
    numerics = read_json(folder / "numerics.json") or {}
    return retries(folder).get("micro_batch", numerics.get("micro_batch", 0))
