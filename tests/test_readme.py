"""The README is true where a machine can check it."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("package", ["crm", "experiments", "sweeps", "analysis"])
def test_the_tree_names_every_module(package):
    tree = README.partition("## What is where")[2]
    missing = [
        path.name
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py" and not re.search(rf"^\s*{re.escape(path.name)}\s", tree, re.MULTILINE)
    ]
    assert not missing


def test_every_command_it_shows_exists():
    import typer.main

    from crm.cli import app

    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    shown = set(re.findall(r"`crm ([a-z]+)", README))
    assert shown <= known


def test_the_pictures_it_shows_are_tracked():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file()


def test_every_make_target_it_shows_exists():
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"\bmake ([a-z-]+)", README):
        assert f"make {target}" in help_text
