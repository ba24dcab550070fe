"""Where a study is kept: an SQLite database (default), a journal file, or a server that a URL names.

The coordinator alone writes to it, so neither file is ever fought over. A journal file is what to take where the runs
lie on a network file system, whose locks SQLite must not be trusted with; hence the default on a cluster.
"""

import os
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from crm.names import unknown

DATABASE, JOURNAL = "study.db", "journal.log"
KINDS = ("sqlite", "journal")
LOCK = ".lock"  # what Optuna adds to the journal's name
STALE = 5.0  # seconds after which a journal's lock was left by a dead writer: an append takes milliseconds


def location(folder: Path, given: str, cluster: str) -> str:
    """The URL of a study's storage; `journal:///path` is a journal file.

    Args:
        given: `sqlite` or `journal` below the study's folder, any other URL, or "" for the default.
    """
    given = given or ("journal" if cluster == "slurm" else "sqlite")
    if given == "sqlite":
        return f"sqlite:///{folder / DATABASE}"
    if given == "journal":
        return f"journal:///{folder / JOURNAL}"
    if "://" not in given:
        raise unknown("storage", given, (*KINDS, "postgresql+psycopg2://HOST/DATABASE"))
    return given.replace("postgresql://", "postgresql+psycopg2://", 1)


def shown(url: str) -> str:
    """The URL without its password."""
    if url.startswith("journal:"):
        return url
    from sqlalchemy.engine import make_url

    found = make_url(url)
    return url if found.password is None else found.render_as_string(hide_password=True)


def open_storage(url: str, write: bool = False) -> BaseStorage:
    """The storage; FileNotFoundError where only reading was meant and there is no file yet.

    Args:
        write: the caller alone writes to it: what a killed writer has left is put in order first.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kind, _, name = url.partition(":///")
    if kind in KINDS and not write and not Path(name).exists():
        raise FileNotFoundError(f"{name} is not there: this study has not begun, or it was moved away")
    if kind == "journal":
        if write:
            mend(Path(name))
        return JournalStorage(JournalFileBackend(name))
    more: dict[str, Any] = {"connect_args": {"timeout": 60}} if kind == "sqlite" else {"pool_pre_ping": True}
    try:
        return RDBStorage(url, engine_kwargs=more)
    except ImportError as error:
        raise ValueError(f"{shown(url)} needs a driver: pip install 'crm-study[postgres]' ({error})") from error
    except Exception as error:  # SQLAlchemy and the drivers have many; all mean that nothing can be kept there
        raise OSError(f"the study's storage {shown(url)} does not open: {error}") from error


def mend(path: Path) -> None:
    """Cuts the line that a killed writer has left torn, and takes its lock away.

    Optuna glues the next line to a torn one, and loses both.
    """
    lock = path.with_name(path.name + LOCK)
    try:
        if time.time() - lock.lstat().st_mtime > STALE:
            lock.unlink()
    except FileNotFoundError:
        pass
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            file.flush()
            os.fsync(file.fileno())
