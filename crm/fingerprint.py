"""The code that a training or an evaluation passes through, part by part: has it changed since? Torch-free.

Code is compared by its syntax tree, so that comments, docstrings and formatting do not count, and part by part (a
function, a class, an entry of a dict of alternatives), so that a new alternative changes no old one. Which modules
count is read off the import statements, from `crm.train` on. A run keeps two things, written by its first attempt:

    provenance.json   "training_code": the text of every module that counts, as a hash
    code.json         the parts of these modules, as hashes; read only where a text differs

What scores a network is the code of its evaluations (`crm.evaluated`), and no change of it makes a training stale: what
was trained stays what it is. It chose the checkpoints `val_best` and `test_best`, though, which `chosen_by` is about.
"""

import ast
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
    "cli", "calibration", "sums", "evaluated", "waivers",
)  # fmt: skip
# Modules that score: what they hold belongs to evaluations.
SCORING = ("evaluate", "corruptions", "conditions", "confusion", "unfinished", "calibration", "data.mapping")
CHOOSING = ("crm.evaluate", "crm.confusion")  # modules that a checkpoint is chosen by
CHOICE = ("evaluate", "iou", "miou", "released_miou")  # and what choosing calls there
FILE = "code.json"
IMPORT = "import of "
Parts = Mapping[str, str]  # name of a part -> hash


def modules(root: Path = ROOT, begin: str = BEGIN, apart: Collection[str] = APART) -> list[str]:
    """The modules that training imports, at the top or inside functions, without those `apart`."""
    found: list[str] = []
    waiting = [begin]
    while waiting:
        name = waiting.pop()
        if name in found or _apart(name, apart) or (path := source_file(name, root)) is None:
            continue
        found.append(name)
        waiting.append(name.rpartition(".")[0])  # its package, which is loaded first
        waiting += imported(ast.parse(path.read_bytes()))
    return sorted(found)


def _apart(name: str, apart: Collection[str]) -> bool:
    parts = name.split(".")
    return parts[0] != "crm" or (len(parts) > 1 and parts[1] in apart)


def scores(name: str) -> bool:
    """Whether a module belongs to evaluations alone."""
    return any(f"{name}.".startswith(f"crm.{own}.") for own in SCORING)


def trains(name: str) -> bool:
    return not scores(name)


def chooses(name: str) -> bool:
    """Whether a checkpoint is chosen by what a module holds."""
    return name in CHOOSING


def source_file(name: str, root: Path) -> Path | None:
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
    return {name: text_hash(name, root) for name in modules(root)}


def code_parts(root: Path = ROOT) -> dict[str, Parts]:
    """Module -> its parts, for code.json."""
    return {name: parts_of(name, root) for name in modules(root)}


@cache
def text_hash(name: str, root: Path) -> str:
    """Twelve hex digits of a module's text; "" where it is gone."""
    path = source_file(name, root)
    return sha256(path.read_bytes()).hexdigest()[:12] if path else ""


@cache
def parts_of(name: str, root: Path) -> Parts:
    path = source_file(name, root)
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
    found = changed_parts(folder, recorded, root)
    return None if found is None else words(found)


def words(names: Collection[str]) -> str:
    return f"the code has changed since: {', '.join(names)}" if names else ""


def changed_parts(folder: Path, recorded: Mapping[str, str] | None, root: Path = ROOT) -> list[str] | None:
    """The parts of the code that trained a run which have changed since; None where its record does not tell."""
    return _since(folder, recorded, root, trains)


def chosen_by(folder: Path, recorded: Mapping[str, str] | None, root: Path = ROOT) -> list[str] | None:
    """The parts of the code that chose a run's checkpoints which have changed since; None where nobody knows."""
    found = _since(folder, recorded, root, chooses)
    if not found:
        return found
    reached = reachable(root, CHOOSING, CHOICE)
    return [name for name in found if name in reached or not _hash_now(name, root)]


def _since(
    folder: Path, recorded: Mapping[str, str] | None, root: Path, counts: Callable[[str], bool]
) -> list[str] | None:
    if recorded is None:
        return None
    touched = _touched(tuple(recorded.items()), root, counts)
    if not touched:
        return []
    try:
        before = json.loads((folder / FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return [f"{module}.{part}" for module in touched for part in differing(before[module], parts_of(module, root))]


@cache
def _touched(recorded: tuple[tuple[str, str], ...], root: Path, counts: Callable[[str], bool]) -> tuple[str, ...]:
    """The modules whose text is another now: the same for all runs of the same code."""
    return tuple(name for name, text in recorded if counts(name) and text != text_hash(name, root))


def now(names: Iterable[str], root: Path = ROOT) -> str:
    """A hash of parts (module.part) as they are now: it tells a further change of one of them."""
    found = {name: _hash_now(name, root) for name in names}
    return sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def _hash_now(name: str, root: Path) -> str:
    """The hash of a part as it is now; "" where it is gone."""
    pieces = name.partition("[")[0].split(".")  # a key may hold dots too
    for count in range(len(pieces) - 1, 0, -1):
        module = ".".join(pieces[:count])
        if source_file(module, root):
            return parts_of(module, root).get(name.removeprefix(f"{module}."), "")
    return ""


@cache
def reachable(root: Path, names: tuple[str, ...], begin: tuple[str, ...]) -> frozenset[str]:
    """The parts of these modules (module.part) that can be got at from identifiers, by name alone: rather too many.

    What calls a function of that name in another module counts too, and what a class does not use of itself.
    """
    found: dict[str, list[tuple[str, set[str]]]] = {}
    for module in names:
        for part, used in uses(module, root).items():
            found.setdefault(part.partition("[")[0], []).append((f"{module}.{part}", used))
    seen: set[str] = set()
    waiting = list(begin)
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for full, used in found.get(name, ()):
            reached.add(full)
            waiting += used
    return frozenset(reached)


@cache
def uses(module: str, root: Path) -> dict[str, set[str]]:
    """The identifiers that each definition, assignment and entry of a module speaks of."""
    path = source_file(module, root)
    found: dict[str, set[str]] = {}
    for node in ast.parse(path.read_text()).body if path else ():
        for name, inner in named(node):
            found.setdefault(name, set()).update(identifiers(inner))
    return found


def named(node: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    """The parts that one top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name, node
    elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
        target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        if isinstance(node.value, ast.Dict) and None not in node.value.keys:
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                yield f"{target}[{ast.unparse(key)}]", value  # type: ignore[arg-type]
        else:
            yield target, node.value


def identifiers(tree: ast.AST) -> set[str]:
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def forget() -> None:
    """Reads the code anew at the next question: for whoever edits it in a process."""
    for known in (text_hash, parts_of, uses, reachable, _touched):
        known.cache_clear()


def differing(before: Parts, now: Parts) -> Iterator[str]:
    """Parts that were there before and are not the same now.

    A new part alone changes nothing: who calls it has changed. An import that is gone was of no use, or who used it has
    changed.
    """
    for name, tree in before.items():
        if now.get(name) != tree and not (name.startswith(IMPORT) and name not in now):
            yield name
