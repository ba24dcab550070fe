"""An MLflow store: found or made, and what is said when it fails."""

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

EXPERIMENT = "crm"
STORE = "crm.store"  # tag of the experiment that tells this store from one that was made anew in its place
DATABASES = ("sqlite:", "postgresql", "mysql", "mssql")  # how a URI begins that is opened without a server
PLACE = ("MLFLOW_TRACKING_", "MLFLOW_S3_", "MLFLOW_GCS_", "MLFLOW_HTTP_REQUEST_TIMEOUT")  # where to, and how to log in


@dataclass(frozen=True)
class Store:
    """An MLflow store that answers, with its experiment."""

    client: Any
    experiment: str
    identity: str  # under which mirror.json remembers what was sent
    place: str = ""  # its URI without a password

    def find(self, tags: Mapping[str, str]) -> Any:
        """The oldest run with all these tags, or None."""
        having = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self.client.search_runs([self.experiment], having, max_results=1, order_by=["attributes.start_time"])
        return found[0] if found else None


def default_uri(runs: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or a file in the runs folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs.absolute() / 'mlflow.db'}"


def connect(uri: str, runs: Path) -> Store:
    """The store, made if it is a file that does not exist yet; raises what MLflow raises if it does not answer."""
    calm()
    from mlflow import MlflowClient

    with _alone_with(uri):
        _refuse_older(uri)
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(EXPERIMENT) or _new_experiment(client, uri, runs)
        if experiment.lifecycle_stage != "active":
            raise ValueError(f"the experiment {EXPERIMENT!r} is deleted in MLflow; restore it, or nothing is mirrored")
        if STORE not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, STORE, uuid4().hex)
            experiment = client.get_experiment(experiment.experiment_id)
    return Store(client, experiment.experiment_id, experiment.tags[STORE], masked(uri))


def calm() -> None:
    """Settings that MLflow reads from the environment: fail soon, print nothing, call nobody, join no other run.

    A job may inherit the run, the experiment or the artifact settings of whatever submitted it: all of MLflow's
    variables are dropped but those that say where the store is and how to log in.
    """
    for name in [name for name in os.environ if name.startswith("MLFLOW_") and not name.startswith(PLACE)]:
        del os.environ[name]
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # the default, 7, blocks for four minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ["MLFLOW_LOGGING_LEVEL"] = "CRITICAL"  # of what it raises it logs the traceback besides


def masked(uri: str) -> str:
    """The URI without its password."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)


def _alone_with(uri: str) -> Any:
    """A lock on a store that is a file: two processes that make its tables at once both fail."""
    if not uri.startswith("sqlite:///"):
        return nullcontext()
    file = _file(uri)
    return locked(file.with_name(file.name + ".lock"))


def _refuse_older(uri: str) -> None:
    """ValueError for a database in use whose schema is another MLflow's.

    MLflow itself would migrate an older one that lacks a table, unasked; whoever still works on it with the older
    MLflow could then not open it any more. One that was killed while it was made is no such store: it holds nothing.
    """
    if not uri.startswith(DATABASES) or (uri.startswith("sqlite:///") and not _file(uri).exists()):
        return
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.pool import NullPool

    with create_engine(uri, poolclass=NullPool).connect() as database:
        if not {"alembic_version", "experiments"} <= set(inspect(database).get_table_names()):
            return
        found = database.execute(text("select version_num from alembic_version")).scalar()
        used = database.execute(text("select count(*) from experiments")).scalar()
    newest = ScriptDirectory(str(Path(db_migrations.__path__[0]))).get_current_head()
    if used and found != newest:
        raise ValueError(f"out-of-date database schema: {found}, where this MLflow has {newest}")


def _file(uri: str) -> Path:
    """The file of an SQLite store."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def _new_experiment(client: Any, uri: str, runs: Path) -> Any:
    from mlflow.exceptions import MlflowException

    # a server knows its own place for artifacts; without one MLflow would put them below the current folder
    place = None if uri.startswith("http") else (runs.absolute() / "mlflow-artifacts").as_uri()
    try:
        client.create_experiment(EXPERIMENT, artifact_location=place)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another machine was faster
            raise
    return client.get_experiment_by_name(EXPERIMENT)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until nobody else holds this file's lock; a process that dies lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------- what is said

# what MLflow, its database or the system say -> what it means; the first that fits
MEANINGS = (
    (r"out-of-date database schema|Can't locate revision",
     "the store was made by another version of MLflow: back it up, then `mlflow db upgrade URI`, or name a new one"),
    (r"disk is full|No space left", "the disk is full: make room; `crm track sync` then sends what is missing"),
    (r"readonly database|Permission denied|unable to open database file|attempt to write a readonly|Read-only",
     "the store may not be written: correct the rights of the file and its folder"),
    (r"file is not a database|malformed", "the file is no MLflow store: move it away, and it is made anew"),
    (r"password authentication|401|403|UNAUTHENTICATED|PERMISSION_DENIED", "the store refuses the login"),
    (r"refused|timed out|Max retries|resolve|unreachable|Connection aborted|could not connect",
     "the store does not answer: start it, or correct MLFLOW_TRACKING_URI"),
    (r"psycopg2", "there is no driver for PostgreSQL: pip install -c constraints.txt -e '.[postgres]'"),
    (r"[Uu]nsupported URI|Could not parse|filesystem tracking|invalid.*URI|registry",
     "MLFLOW_TRACKING_URI is no store: sqlite:///FILE, http(s)://HOST:PORT or postgresql+psycopg2://..."),
)  # fmt: skip


def words(error: Exception, uri: str) -> str:
    """What went wrong with a store, what to do about it, and the library's own words, cut; never a password."""
    text = " ".join(str(error).split())
    if (secret := urlsplit(uri).password) is not None:
        text = text.replace(secret, "***")
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    known = "No space left" if full else text
    meaning = next((meaning for pattern, meaning in MEANINGS if re.search(pattern, known)), "")
    own = f"{type(error).__name__}: {text.partition(' [SQL:')[0][:300]}"
    return f"{masked(uri)}: {meaning} ({own})" if meaning else f"{masked(uri)}: {own}"
