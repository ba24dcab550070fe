"""How every benchmark speaks: the same options, the same description of the machine, text or JSON."""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from crm.machine import cores
from crm.provenance import cpu


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The options of one benchmark: it adds its own; `--json` prints JSON, `--json FILE` writes it beside the text."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON to standard output, or into a file")
    return made


def show(given: argparse.Namespace, found: Any, text: str) -> None:
    """Prints what was found as the options want it."""
    if given.json == "-":
        print(json.dumps(found, indent=1))
        return
    print(text)
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What a figure was measured on, and how busy it is now: processes that want a core, mean of the last minute."""
    return {"cpu": cpu(), "cores": cores(), "load": round(os.getloadavg()[0], 2)}


def machine_words(about: dict[str, Any]) -> str:
    return f"{about['cpu']}, {about['cores']} cores, load {about['load']}"


def host_kind(gpu: str = "") -> str:
    """Names a kind of machine, never a machine: its CPU and how many cores of it there are, or its GPU."""
    words = re.sub(r"\(\w+\)|@|\bcpu\b|\bprocessor\b", " ", cpu().lower())
    return re.sub(r"[^a-z0-9]+", "-", (gpu or f"{words} {cores()} cores").lower()).strip("-")


def say(text: str) -> None:
    """Progress, which is no result."""
    print(text, file=sys.stderr, flush=True)
