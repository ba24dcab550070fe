"""A study in one file: what its tables are made from, in what environment, by which code. Torch-free.

    README.txt                  what this is, and how to render from it
    runs/<id>/                  the records: no checkpoints unless asked for
    runs/.sweeps/<name>/        what was asked of the sweeps
    reports/                    ledgers and tables as they were, text alone: pages and pictures are made again
    environment/                the versions that were tested and those that were there
    code/                       a git bundle of HEAD with what was uncommitted, or the files themselves

The same study gives the same bytes. Anonymous, it names no host, user, place or address: the code is files without
their history, and what records and logs say of these is replaced. Of the matrices nothing has to be.
"""

import getpass
import gzip
import io
import json
import platform
import re
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

from crm.cluster.snapshot import ROOT, tracked
from crm.provenance import git
from crm.records import claims, raw_lines, read_json

# Of a run; the claim of who is at it and half-written evidence are nobody's business.
RECORDS = (
    "config.json", "provenance.json", "uncommitted.diff", "code.json", "numerics.json", "journal.jsonl", "result.json",
    "failure.json", "waivers.jsonl", "elsewhere.json", "overhead.json", "diagnosis.json", "log.txt",
)  # fmt: skip
EVALUATIONS = ("evals/[!.]*/*.npz", "evals/[!.]*/*.jsonl", "evals/[!.]*/code-*.json")
REPORTED = (".json", ".csv", ".md", ".tex")
GENERIC = ("root", "user", "ubuntu", "runner", "nobody", "localhost")  # they name nobody, and are words besides
ANONYMOUS = "anonymous"

README = """What a study's tables are made from: records of runs, ledgers, environment and code.

On any machine, without torch and without a GPU:

{unpack}
    python -m venv .venv && .venv/bin/pip install numpy pandas scipy matplotlib seaborn jinja2 markupsafe pillow \\
        psutil rich typer
    PYTHONPATH={code} CRM_HOME=. .venv/bin/python -m crm tables --runs runs
    PYTHONPATH={code} CRM_HOME=. .venv/bin/python -m crm report SWEEP --runs runs

environment/constraints.txt has the versions that were tested; `pip install -c environment/constraints.txt` takes them.
Runs: {runs}. Sweeps: {sweeps}.
"""


def pack(
    target: Path,
    runs: Path,
    ids: Sequence[str],
    sweeps: Sequence[str],
    reports: Path,
    anonymous: bool = False,
    checkpoints: bool = False,
    root: Path = ROOT,
) -> list[str]:
    """Writes the capsule; the names in it.

    Args:
        ids: the runs.
        sweeps: names of sweeps in the form they were asked for; what was asked of them, and their reports, go in too.
        root: of the project's code.
    """
    content: dict[str, bytes] = {}
    for id in sorted(set(ids)):
        for path in _files_of(runs / id, checkpoints):
            content[f"runs/{path.relative_to(runs).as_posix()}"] = path.read_bytes()
    for name in sweeps:
        if (asked := runs / ".sweeps" / name / "asked.json").exists():
            content[f"runs/.sweeps/{name}/asked.json"] = asked.read_bytes()
    for folder in (*(reports / name for name in sweeps), reports / "tables"):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in REPORTED:
                content[f"reports/{path.relative_to(reports).as_posix()}"] = path.read_bytes()
    content |= dict(_environment(root))
    if anonymous:
        hide = Hide.of(runs, ids)
        content = {name: hide(name, inside) for name, inside in content.items()}
        content |= {f"code/{name}": hide.code((root / name).read_bytes()) for name in tracked(root)}
    else:
        content |= _code(root)
    bundled = "code/code.bundle" in content
    content["README.txt"] = README.format(
        unpack="    git clone code/code.bundle source" if bundled else "", code="source" if bundled else "code",
        runs=len(set(ids)), sweeps=", ".join(sweeps) or "none",
    ).encode()  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(_archive(content))
    return sorted(content)


def _files_of(folder: Path, checkpoints: bool) -> Iterator[Path]:
    yield from (folder / name for name in RECORDS if (folder / name).is_file())
    patterns = [*EVALUATIONS, "attempts/*.json"]
    if checkpoints:
        patterns += [f"checkpoints/{name}.safetensors" for name in ("last", "val_best", "test_best")]
    for pattern in patterns:
        yield from sorted(folder.glob(pattern))


def _archive(content: Mapping[str, bytes]) -> bytes:
    """A tar.gz in which nothing but names and contents counts."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as squeezed,
        tarfile.open(fileobj=squeezed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted(content):
            info = tarfile.TarInfo(name)  # mode 644, owner 0 and time 0
            info.size = len(content[name])
            archive.addfile(info, io.BytesIO(content[name]))
    return packed.getvalue()


def _environment(root: Path) -> Iterator[tuple[str, bytes]]:
    if (root / "constraints.txt").is_file():
        yield "environment/constraints.txt", (root / "constraints.txt").read_bytes()
    there = {each.metadata["Name"].lower(): each.version for each in distributions() if each.metadata["Name"]}
    versions = {"python": platform.python_version(), "packages": dict(sorted(there.items()))}
    yield "environment/versions.json", (json.dumps(versions, indent=1) + "\n").encode()


def _code(root: Path) -> dict[str, bytes]:
    """A bundle of HEAD and what differs from it; without git, the files."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "code.bundle"
        command = ["git", "-C", str(root), "-c", "pack.threads=1", "bundle", "create", "-q", str(path), "HEAD"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return {f"code/{name}": (root / name).read_bytes() for name in tracked(root)}
        found = {"code/code.bundle": path.read_bytes()}
    if diff := git("diff", "HEAD", at=root):
        found["code/uncommitted.diff"] = diff.encode()
    return found


# ---------------------------------------------------------------------------------------------- anonymity

PLACE = re.compile(r"(?<![\w.:<>-])~?/(?:[\w.@+ -]*[\w.@+-]/)+([\w.@+-]*)")  # an absolute path; its last part is kept
ADDRESS = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*\w")
NAMED = re.compile(r'("(?:host|boot|user|hostname|account|nodes?|nodelist)": *)"[^"]*"')  # keys of JSON


class Hide:
    """Replaces hosts, users, places and addresses in texts."""

    def __init__(self, words: Iterable[str], places: Iterable[str]) -> None:
        """
        Args:
            words: names of hosts and users, which are replaced where they stand alone.
            places: folders, which are replaced wherever they stand.
        """
        words = sorted({word for word in words if word and word.lower() not in GENERIC}, key=lambda w: (-len(w), w))
        joined = "|".join(map(re.escape, words))
        self._words = re.compile(rf"(?<![A-Za-z0-9])(?:{joined})(?![A-Za-z0-9])", re.IGNORECASE) if words else None
        self._places = sorted({place for place in places if len(place) > 1}, key=lambda p: (-len(p), p))

    @classmethod
    def of(cls, runs: Path, ids: Sequence[str]) -> "Hide":
        """With all that this process and these runs know."""
        hosts = {socket.gethostname(), socket.getfqdn()}
        users = {getpass.getuser(), Path.home().name}
        for id in ids:
            for one in (*claims(runs / id), *raw_lines(runs / id / "journal.jsonl")):
                hosts.add(str(one.get("host") or ""))
                if isinstance(job := one.get("job"), Mapping):
                    users.add(str(job.get("user") or ""))
        hosts |= {host.partition(".")[0] for host in hosts}
        return cls({*hosts, *users}, {str(Path.home()), str(runs.resolve()), str(Path.cwd())})

    def __call__(self, name: str, content: bytes) -> bytes:
        """A record or a log; what is no text has nothing to hide."""
        if Path(name).suffix in (".npz", ".safetensors"):
            return content
        text = content.decode(errors="replace")
        text = NAMED.sub(rf'\1"{ANONYMOUS}"', text)
        text = PLACE.sub(r"<place>/\1", text)
        return self._known(ADDRESS.sub(ANONYMOUS, text)).encode()

    def code(self, content: bytes) -> bytes:
        """A file of code: only what is known of hosts, users and places, since it must still run."""
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return content
        return self._known(text).encode()

    def _known(self, text: str) -> str:
        for place in self._places:
            if place.strip("/").lower() not in GENERIC:
                text = text.replace(place, "<place>")
        return self._words.sub(ANONYMOUS, text) if self._words else text


def runs_in(ledger: Path, runs: Path) -> list[str]:
    """The runs that a ledger names."""
    found = sorted(set(re.findall(r'"((?:import-)?[0-9a-f]{12,})"', ledger.read_text())))
    return [id for id in found if (runs / id / "config.json").exists()]


def imported(runs: Path, ids: Iterable[str]) -> list[str]:
    """The runs that hold evaluations of these on other data sets."""
    found = []
    for id in ids:
        found += [one["run"] for one in (read_json(runs / id / "elsewhere.json") or {}).values()]
    return found
