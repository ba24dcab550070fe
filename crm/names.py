"""Names a person typed, checked against the names that exist."""

from collections.abc import Iterable
from difflib import get_close_matches
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
