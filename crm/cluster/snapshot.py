"""The code that a job runs: a copy taken at submission, so that edits made while jobs wait change nothing.

runs/.snapshots/<12 hex digits>/   what git tracks and what it would track, under its hash
    SNAPSHOT.json                  commit, whether the tree was dirty, hash
    uncommitted.diff               what differed from the commit
"""

import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from crm.provenance import SNAPSHOT, git
from crm.records import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
NEVER = (".venv", "runs", "reports", "data", "cache")  # at the root, also where git does not ignore them
PACKAGES = ("crm", "experiments", "sweeps", "analysis")  # what is copied where there is no git


def take(runs: Path, root: Path = ROOT) -> Path:
    """The folder of the snapshot of `root` as it is now; made if there is none of the same content."""
    files = tracked(root)
    digest = sha256()
    for name in files:
        digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
    found = digest.hexdigest()[:12]
    folder = runs.resolve() / ".snapshots" / found
    if folder.is_dir():
        return folder
    scratch = folder.with_name(f".{found}.{uuid4().hex[:8]}")
    try:
        for name in files:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, scratch / name)
        diff = git("diff", "HEAD", at=root) or ""
        (scratch / "uncommitted.diff").write_text(diff)
        commit = (git("rev-parse", "HEAD", at=root) or "unknown").strip()
        write_json(scratch / SNAPSHOT, {"commit": commit, "dirty": bool(diff), "hash": found, "files": len(files)})
        os.rename(scratch, folder)
    except OSError:
        if not folder.is_dir():  # else another call was as fast, with the same content
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def tracked(root: Path) -> list[str]:
    """Names of the files that make up the project: tracked by git or not ignored by it; without git, its packages."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        paths = [
            path for package in PACKAGES for path in (root / package).rglob("*") if "__pycache__" not in path.parts
        ]
        listed = [path.relative_to(root).as_posix() for path in paths]
    kept = {name for name in listed if name and name.partition("/")[0] not in NEVER}
    return sorted(name for name in kept if (root / name).is_file() and not (root / name).is_symlink())


def refuse_other_code(snapshot: Path) -> None:
    """RuntimeError unless this process runs the snapshot's code."""
    if snapshot.resolve() != ROOT:
        raise RuntimeError(f"this job was to run the code in {snapshot}, but Python found {ROOT}; see PYTHONPATH")
    if read_json(snapshot / SNAPSHOT) is None:
        raise RuntimeError(f"{snapshot} is no whole snapshot")
