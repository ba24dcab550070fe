"""Which run folder holds a run's evaluations on another data set.

A run evaluated elsewhere is an import of its checkpoint (`crm.weights.imports.import_run`), with a folder of its own;
here the run remembers which. Torch-free.
"""

from pathlib import Path

from crm.records import read_json, write_json

FILE = "elsewhere.json"  # in the run folder: "selection dataset" -> folder and checkpoint


def remember(folder: Path, selection: str, dataset: str, imported: Path) -> None:
    """Writes that the run's checkpoint is evaluated on that data set in the folder `imported`."""
    known = read_json(folder / FILE) or {}
    entry = {"run": imported.name, "checkpoint": _checkpoint(folder, selection)}
    write_json(folder / FILE, {**known, f"{selection} {dataset}": entry})


def on(folder: Path, selection: str, dataset: str) -> Path | None:
    """The folder with the evaluations of the run's present checkpoint on that data set; None if there is none."""
    entry = (read_json(folder / FILE) or {}).get(f"{selection} {dataset}")
    if entry is None or entry["checkpoint"] != _checkpoint(folder, selection):
        return None
    return folder.parent / entry["run"]


def _checkpoint(folder: Path, selection: str) -> str | None:
    """SHA-256 of a finished run's checkpoint; None for a run that is not finished."""
    result = read_json(folder / "result.json") or {}
    return result.get("checkpoints", {}).get(selection, {}).get("sha256")
