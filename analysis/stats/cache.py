"""Results of bootstraps, remembered by what they were computed from, so that a table is not computed twice."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from crm.confusion import load_evaluation
from crm.records import read_json, write_json

METHOD = 1  # of analysis.stats: another one forgets what was computed before


class Cache:
    """A folder of small JSON files. Deleting it costs time and nothing else.

    A result's key is a hash of the per-image matrices it came from, the draws, their seed and METHOD. So that a key can
    be told without opening an evaluation, the hash of its content is remembered by path, size, inode and time of
    change; an evaluation is never changed in place but replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._contents: dict[tuple[Path, int, int], str] = {}  # a row is compared with several others

    def content(self, path: Path) -> str:
        """Hash of the names, classes and per-image matrices of an evaluation; opens it once."""
        now = path.stat()
        key = (path, now.st_mtime_ns, now.st_ino)
        if key not in self._contents:
            self._contents[key] = self._content(path)
        return self._contents[key]

    def _content(self, path: Path) -> str:
        now = path.stat()
        stamp = [now.st_size, now.st_mtime_ns, now.st_ino]
        place = self._place("content", str(path.absolute()))
        known = read_json(place)
        if known is not None and known.get("stamp") == stamp:
            return known["hash"]
        found = load_evaluation(path)
        facts = [found.names.tolist(), found.meta["classes"], found.confusion.shape, str(found.confusion.dtype)]
        hashed = sha256(json.dumps(facts).encode() + np.ascontiguousarray(found.confusion).tobytes()).hexdigest()
        write_json(place, {"stamp": stamp, "hash": hashed})
        return hashed

    def remembered(self, key: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` returns, as JSON; computed once for every key."""
        place = self._place("results", [METHOD, key])
        known = read_json(place)
        if known is None:
            known = compute()
            write_json(place, known)
        return known

    def _place(self, kind: str, key: Any) -> Path:
        hashed = sha256(json.dumps(key).encode()).hexdigest()
        return self.folder / kind / hashed[:2] / f"{hashed[2:]}.json"
