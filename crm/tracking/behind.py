"""What a store lacks, from the run folders alone."""

from pathlib import Path
from typing import Any

from crm.records import read_json
from crm.tracking.listing import read_listing
from crm.tracking.tail import Tail


def behind(runs: Path, name: str, place: str) -> dict[str, Any]:
    """Cells, those begun, and the runs and points that the store at `place`, a URI without password, was not sent."""
    listing = read_listing(runs, name)
    begun = late = points = 0
    for cell in listing.cells:
        folder = runs / cell["id"]
        lines, size = _sent(folder, place)
        journal = folder / "journal.jsonl"
        if not journal.exists():
            continue
        begun += 1
        if journal.stat().st_size == size:
            continue
        late += 1
        points += sum(len(found) for number, found in Tail(folder).news() if number >= lines)
    return {"name": name, "cells": len(listing.cells), "begun": begun, "runs": late, "points": points}


def _sent(folder: Path, place: str) -> tuple[int, int]:
    """Lines that were sent there, and the size of the journal then."""
    try:
        stores = (read_json(folder / "mirror.json") or {}).values()
    except ValueError:
        return 0, -1
    known = [cursor for cursor in stores if cursor.get("place") == place]
    return (known[-1]["lines"], known[-1]["size"]) if known else (0, -1)
