"""The code that a training run passes through, part by part: what tells whether it has changed since. Torch-free.

Code is compared by its syntax tree, so that comments, docstrings and formatting do not count, and part by part (a
function, a class, an entry of a dict of alternatives), so that a new alternative changes no old one. Which modules
count is read off the import statements, from `crm.train` on. A run keeps two things, written by its first attempt:

    provenance.json   "training_code": the text of every module that counts, as a hash
    code.json         the parts of these modules, as hashes; read only where a text differs
"""

import ast
import json
from collections.abc import Iterator, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "crm.train"
# No number of a trained network passes through these: they record, look, name and refuse, or look at networks that are
# trained. What config.py holds is recorded as values, and a default that moved is a reason of its own.
APART = (
    "records", "provenance", "fingerprint", "stale", "failures", "config", "machine", "names", "faults", "cluster",
    "cli", "calibration", "sums",
)  # fmt: skip
FILE = "code.json"
IMPORT = "import of "
Parts = Mapping[str, str]  # name of a part -> hash


def modules(root: Path = ROOT, begin: str = BEGIN) -> list[str]:
    """The modules that training imports, at the top or inside functions, without those APART."""
    found: list[str] = []
    waiting = [begin]
    while waiting:
        name = waiting.pop()
        if name in found or _apart(name) or (path := _source(name, root)) is None:
            continue
        found.append(name)
        waiting.append(name.rpartition(".")[0])  # its package, which is loaded first
        waiting += imported(ast.parse(path.read_bytes()))
    return sorted(found)


def _apart(name: str) -> bool:
    parts = name.split(".")
    return parts[0] != "crm" or (len(parts) > 1 and parts[1] in APART)


def _source(name: str, root: Path) -> Path | None:
    """The file of a module; None where the name is no module, but something in one."""
    path = root.joinpath(*name.split("."))
    return next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()), None)


def imported(tree: ast.AST) -> Iterator[str]:
    """Every name that an import statement might mean as a module, but for those that only type checkers see."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def training_code(root: Path = ROOT) -> dict[str, str]:
    """Module -> hash of its text, for provenance.json."""
    return {name: _text_hash(name, root) for name in modules(root)}


def code_parts(root: Path = ROOT) -> dict[str, Parts]:
    """Module -> its parts, for code.json."""
    return {name: _parts(name, root) for name in modules(root)}


@cache
def _text_hash(name: str, root: Path) -> str:
    """Twelve hex digits of a module's text; "" where it is gone."""
    path = _source(name, root)
    return sha256(path.read_bytes()).hexdigest()[:12] if path else ""


@cache
def _parts(name: str, root: Path) -> Parts:
    path = _source(name, root)
    return parts(path.read_text()) if path else {}


def parts(text: str) -> Parts:
    """The parts of a module's source, name -> hash of its syntax tree.

    Top-level definitions and assignments count one by one, entries of a dict literal too, so that a new one changes no
    old one. All other statements together are one part; imports are a part for every name that they bring.
    """
    found: dict[str, list[Any]] = {"its statements": []}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.setdefault(node.name, []).append(plain(node))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            origin = node.module if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                found.setdefault(f"{IMPORT}{alias.asname or alias.name}", []).append([origin, alias.name])
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            if isinstance(node.value, ast.Dict) and None not in node.value.keys:
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    found.setdefault(f"{target}[{ast.unparse(key)}]", []).append(plain(value))  # type: ignore[arg-type]
            else:
                found.setdefault(target, []).append(plain(node))
        elif not _is_text(node):
            found["its statements"].append(plain(node))
    return {name: sha256(json.dumps(tree).encode()).hexdigest()[:8] for name, tree in found.items()}


def plain(node: Any) -> Any:
    """A syntax tree as lists of names and values, without docstrings; the same in every version of Python."""
    if isinstance(node, list):
        return [plain(inner) for inner in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list) and value and _is_text(value[0]):
            value = value[1:]
        if value not in (None, []) and name not in ("ctx", "kind", "type_comment"):
            fields.append([name, plain(value)])
    return [type(node).__name__, fields]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def changed(folder: Path, recorded: Mapping[str, str] | None, root: Path = ROOT) -> str | None:
    """Which of the code that trained a run has changed since, in words; None where its record does not tell.

    Args:
        recorded: "training_code" of its provenance.
        root: folder of the code as it is now.
    """
    if recorded is None:
        return None
    touched = [name for name, text in recorded.items() if text != _text_hash(name, root)]
    if not touched:
        return ""
    try:
        before = json.loads((folder / FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    names = [f"{module}.{part}" for module in touched for part in _changed(before[module], _parts(module, root))]
    return f"the code has changed since: {', '.join(names)}" if names else ""


def _changed(before: Parts, now: Parts) -> Iterator[str]:
    """Parts that were there before and are not the same now.

    A new part alone changes nothing: who calls it has changed. An import that is gone was of no use, or who used it has
    changed.
    """
    for name, tree in before.items():
        if now.get(name) != tree and not (name.startswith(IMPORT) and name not in now):
            yield name
