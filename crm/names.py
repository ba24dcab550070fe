"""Names a person typed, checked against the names that exist."""

import ast
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist: it lists the ones that do and says which one was probably meant."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"no {kind} {name!r}.{hint} There is: {', '.join(known) or 'none'}")


def chosen(kind: str, name: str, options: dict[str, T]) -> T:
    """`options[name]`, or the error that names what exists."""
    if name not in options:
        raise unknown(kind, name, options)
    return options[name]


@cache
def family(file: str, name: str) -> tuple[str, ...]:
    """The keys of a family of alternatives, as in `family("masking.py", "MASKINGS")`, in the order of its file.

    Read from the source, whose dict is a literal: importing it would load torch, which takes seconds.
    """
    return tuple(explained(file, name))


@cache
def explained(file: str, name: str) -> dict[str, str]:
    """The members of a family, each with one line about it: its text, or the first line of its function or class.

    "" for a member that says nothing.
    """
    tree = ast.parse((Path(__file__).parent / file).read_text())
    said = {
        node.name: (ast.get_docstring(node) or "").partition("\n")[0]
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node.value, ast.Dict), f"{name} in {file} must be a literal dict"
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {ast.literal_eval(key): _line(value, said) for key, value in pairs if key is not None}
    raise KeyError(f"{file} has no {name}")


def _line(value: ast.expr, said: dict[str, str]) -> str:
    """What a value of such a dict is: itself if it is text, else what its last name is documented as."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    names = [node.id for node in ast.walk(value) if isinstance(node, ast.Name)]
    return next((said[name] for name in reversed(names) if said.get(name)), "")
