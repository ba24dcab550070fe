"""What is written beside evaluations, so that it can be told later whether they would come out otherwise. Torch-free.

    evals/<selection>/index.jsonl        a line per evaluation written, the last of a condition counts: SHA-256 and size
                                         of its file, what it says of itself (checkpoint, frames, version of the
                                         corruptions, hash of the code), its images, its matrices summed (`crm.sums`)
    evals/<selection>/code-<hash>.json   the code that it passed through, part by part; hundreds of evaluations share it

An evaluation passes through what `crm.evaluate` imports. Of the corruptions only those of its condition count, and what
they call. Of evaluations that name no code nothing is known but what they say themselves.
"""

import ast
import json
from collections.abc import Collection, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from crm.conditions import Condition
from crm.fingerprint import APART, ROOT, differing, modules, parts_of, reachable, source_file, text_hash, uses
from crm.records import write_json

BEGIN = "crm.evaluate"
# Confidence is counted here, and a condition is recorded by its name, which says all of it.
NOT_HERE = (*(name for name in APART if name != "calibration"), "conditions")
CORRUPTIONS = "crm.corruptions"
INDEX = "index.jsonl"
KINDS = ("ALWAYS", "SHARES", "AMOUNTS", "THREE", "LEVELS")  # its dicts of alternatives
VERSION = f"{CORRUPTIONS}.VERSION"  # a reason of its own
Code = Mapping[str, Mapping[str, Any]]  # "texts": module -> hash; "parts": module -> parts


# ---------------------------------------------------------------------------------------------- writing


@cache
def code(root: Path = ROOT) -> Code:
    """The code that evaluations pass through, as it is when this process first asks."""
    names = modules(root, BEGIN, NOT_HERE)
    return {
        "texts": {name: text_hash(name, root) for name in names},
        "parts": {name: {**parts_of(name, root), **_members(name, root)} for name in names},
    }


def code_hash(found: Code) -> str:
    return sha256(json.dumps(found["texts"], sort_keys=True).encode()).hexdigest()[:12]


def keep_code(folder: Path, selection: str, root: Path = ROOT) -> str:
    """Writes the code file unless it is there; its hash."""
    found = code(root)
    path = code_file(folder, selection, code_hash(found))
    if not path.exists():
        write_json(path, found)
    return code_hash(found)


def code_file(folder: Path, selection: str, hash: str) -> Path:
    return folder / "evals" / selection / f"code-{hash}.json"


# ---------------------------------------------------------------------------------------------- reading


def index(place: Path, names: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """The newest line of each evaluation in a folder evals/<selection>, by the name of its condition.

    Args:
        names: of the conditions that matter, for others are not parsed.
    """
    try:
        content = (place / INDEX).read_bytes()
    except FileNotFoundError:
        return {}
    starts = (b"{",) if names is None else tuple(f'{{"condition": {json.dumps(name)},'.encode() for name in names)
    newest = {}
    for line in content.split(b"\n"):
        if line.startswith(starts):
            newest[line[: line.find(b",")]] = line
    found = {}
    for line in newest.values():
        try:
            value = json.loads(line)
        except ValueError:
            continue  # torn; the lines before it are about a file that has been replaced
        if "meta" in value:  # else from before the index had it
            found[value["condition"]] = value
    return found


def changed(
    folder: Path, selection: str, hash: str | None, condition: Condition, root: Path = ROOT
) -> list[str] | None:
    """The parts of the code (module.part) that an evaluation passed through and that have changed since.

    None where nobody knows: the evaluation names no code, or its file is gone or is not what it was.
    """
    if hash is None:
        return None
    if not _remember(code_file(folder, selection, hash), hash):
        return None
    return list(_changed_since(hash, frozenset({condition.rgb.kind, condition.thermal.kind}), root))


_KNOWN: dict[str, Code] = {}  # by hash: thousands of runs share one


def _remember(path: Path, hash: str) -> bool:
    """Whether the file tells the code of that hash."""
    if hash not in _KNOWN:
        try:
            found = json.loads(path.read_text())
            if code_hash(found) != hash:
                return False
            _KNOWN[hash] = found
        except (OSError, ValueError, KeyError, TypeError):
            return False
    return True


@cache
def _changed_since(hash: str, kinds: frozenset[str], root: Path) -> tuple[str, ...]:
    """What has changed of a known code for an evaluation under these kinds of degradation."""
    then = _KNOWN[hash]
    found = []
    for module in sorted(name for name, text in then["texts"].items() if text != text_hash(name, root)):
        before, after = then["parts"][module], {**parts_of(module, root), **_members(module, root)}
        names = dict.fromkeys(differing(before, after))
        # A kind that was there gets a line more in one of the tables: another corruption from now on.
        names |= dict.fromkeys(name for name in after if name not in before and name.endswith(_keys(kinds)))
        found += [f"{module}.{part}" for part in names if _counts(module, part, kinds, after, root)]
    return tuple(found)


def _keys(kinds: Collection[str]) -> tuple[str, ...]:
    return tuple(f"[{kind!r}]" for kind in kinds)


def _counts(module: str, part: str, kinds: frozenset[str], after: Mapping[str, str], root: Path) -> bool:
    """Whether a part has to do with an evaluation under these kinds."""
    full = f"{module}.{part}"
    if module != CORRUPTIONS and not module.startswith(f"{CORRUPTIONS}."):
        return True
    if full == VERSION:
        return False
    if module == CORRUPTIONS:
        whole = part.partition("[")[0]
        if "[" in part:
            return part.endswith(_keys(kinds))
        return not any(name.startswith(f"{whole}[") for name in after)  # else its members are looked at one by one
    reached = _reached(root)
    own = set().union(*(reached.get(kind, frozenset()) for kind in kinds))
    return full in own or not any(full in others for others in reached.values())


@cache
def _reached(root: Path) -> dict[str, frozenset[str]]:
    """Kind of degradation -> the parts of the corruptions' modules that it may use; by names, rather too many.

    What the functions around the corruptions use directly counts for every kind that does something.
    """
    own = tuple(f"{CORRUPTIONS}.{path.stem}" for path in (root / "crm/corruptions").glob("[!_]*.py"))
    around: set[str] = set()
    entries: dict[str, set[str]] = {}
    for part, used in uses(CORRUPTIONS, root).items():
        name, bracket, key = part.partition("[")
        if bracket and name in KINDS:
            entries[ast.literal_eval(key.removesuffix("]"))] = used
        elif not bracket:
            around |= used
    return {
        kind: reachable(root, own, tuple(sorted(used | (around if kind != "clean" else set()))))
        for kind, used in entries.items()
    }


@cache
def _members(module: str, root: Path) -> dict[str, str]:
    """Of the corruptions' tables that are lists of kinds, an entry per kind, as dicts have them."""
    path = source_file(module, root)
    found: dict[str, str] = {}
    if module != CORRUPTIONS or path is None:
        return found
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        values = [inner.value if isinstance(inner, ast.Constant) else None for inner in node.value.elts]
        if all(isinstance(value, str) for value in values):
            found |= {f"{ast.unparse(node.targets[0])}[{value!r}]": "member" for value in values}
    return found


def forget() -> None:
    """Reads the code anew at the next question: for whoever edits it in a process."""
    for known in (code, _changed_since, _reached, _members):
        known.cache_clear()
