"""The same records from an MLflow store alone: its artifacts become run folders again, below a folder of their own."""

import json
import os
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from analysis.load import Study, read
from crm.records import read_json, write_json
from crm.sweep import Sweep
from crm.tracking.store import EXPERIMENT, calm, masked

NOT_NEEDED = ("checkpoints", "report")  # artifacts that no frame is made from
MARK = ".fetched.json"  # which MLflow run a fetched folder is, and how it stood then


def read_from(sweep: Sweep, uri: str, cache: Path, changes: Mapping[str, Any] | None = None) -> Study:
    """What `analysis.load.read` reads from run folders, from the store at `uri`."""
    return read(sweep, fetch(sweep, uri, cache, changes), changes)


def fetch(sweep: Sweep, uri: str, cache: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Downloads what the store has of the sweep's runs and returns the folder, one of its own per store below `cache`.

    Runs are found by the tag crm.run_id, whichever sweep asked for them first; of several copies of one run, a finished
    one, the newest, counts. A run is downloaded once, and again only if its copy has changed. ValueError where the
    store cannot be read or holds none of the runs.
    """
    calm()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    folder = cache / "mlflow" / sha256(uri.encode()).hexdigest()[:12]
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ValueError(f"{uri}: there is no such file")  # MLflow would make an empty store of that name
    try:
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
    except MlflowException as error:
        raise ValueError(f"{masked(uri)} cannot be read: {' '.join(str(error).split())[:300]}") from error
    found = 0
    for id in {cell.id for cell in sweep.cells(changes)}:
        run = _copy(client, experiment.experiment_id, id) if experiment else None
        if run is None:
            shutil.rmtree(folder / id, ignore_errors=True)  # deleted in MLflow since
            continue
        found += 1
        _fetch_run(client, run, folder / id)
    if not found:
        raise ValueError(f"{masked(uri)} holds no run of this sweep; `crm track sync` sends them")
    return folder


def _copy(client: Any, experiment: str, id: str) -> Any:
    """The MLflow run that stands for a run; None if there is none."""
    having = f"tags.`crm.kind` = 'run' and tags.`crm.run_id` = '{id}'"
    found = client.search_runs([experiment], having, order_by=["attributes.start_time DESC"])
    return next((run for run in found if run.info.status == "FINISHED"), found[0] if found else None)


def _fetch_run(client: Any, run: Any, folder: Path) -> None:
    """Makes the folder what the artifacts are, all or nothing."""
    files = _files(client, run.info.run_id)
    state = {"run": run.info.run_id, "status": run.info.status, "ended": run.info.end_time, "files": files}
    if read_json(folder / MARK) == json.loads(json.dumps(state)):
        return
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        for path in files:
            place = (scratch / path).parent  # MLflow puts a file under its last name
            place.mkdir(parents=True, exist_ok=True)
            client.download_artifacts(run.info.run_id, path, str(place))
        # what tells a run that was begun from one that was not, for its state
        (scratch / "attempts").mkdir(exist_ok=True)
        write_json(scratch / MARK, state)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _files(client: Any, run: str, below: str | None = None) -> dict[str, int]:
    """Artifacts and their sizes in bytes, by path."""
    found: dict[str, int] = {}
    for entry in client.list_artifacts(run, below):
        outside = ".." in Path(entry.path).parts or Path(entry.path).is_absolute()
        if entry.path.partition("/")[0] in NOT_NEEDED or outside:
            continue
        found |= _files(client, run, entry.path) if entry.is_dir else {entry.path: entry.file_size}
    return found
