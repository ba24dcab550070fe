"""The shape of the project: who imports whom, what starts fast, what is locked, and that no setting is dead."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from crm.config import Config, flatten

ROOT = Path(__file__).parents[1]
LAYERS = ("crm", "experiments", "sweeps", "analysis")  # each may import those before it, and none after it
HEAVY = ("torch", "timm", "mlflow", "pandas", "optuna", "submitit", "matplotlib", "seaborn", "transformers")
COMMAND = "crm/cli"  # the command alone may reach outward, inside its functions


def modules(*folders: str) -> list[str]:
    """Dotted names of the modules below these folders."""
    paths = [path.relative_to(ROOT) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]


def source(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Every module named by an import statement, and whether it stands inside a function."""
    tree = ast.parse(source(module).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    inside = {id(node) for outer in ast.walk(tree) if isinstance(outer, functions) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from ((name, id(node) in inside) for name in names)


@pytest.mark.parametrize("module", modules(*LAYERS))
def test_imports_point_one_way(module):
    outward = {*LAYERS[LAYERS.index(module.partition(".")[0]) + 1 :], "tests", "benchmarks"}
    is_command = source(module).is_relative_to(ROOT / COMMAND)
    wrong = [name for name, lazy in imports(module) if name.partition(".")[0] in outward and not (is_command and lazy)]
    assert not wrong


@pytest.mark.parametrize("module", modules("analysis"))
def test_analysis_never_imports_torch(module):
    assert not {name.partition(".")[0] for name, _ in imports(module)} & {"torch", "torchvision", "timm"}


def loaded(module: str) -> set[str]:
    """Names in sys.modules after a fresh interpreter has imported one module."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


LIGHT = [
    *modules("crm/cli"),
    "crm.sweep",
    "crm.records",
    "crm.conditions",
    "crm.machine",
    "crm.doctor",
    "crm.data.specs",
]


@pytest.mark.parametrize("module", [*LIGHT, *modules("experiments", "sweeps")])
def test_planning_and_looking_start_without_anything_heavy(module):
    assert not loaded(module) & set(HEAVY)


def test_help_loads_the_module_of_no_command():
    code = "import sys; from crm.cli import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {name for name in done.stdout.split() if re.fullmatch(r"crm\.\w+(\.\w+)*", name)} == {"crm.cli"}


def test_every_command_is_in_the_module_that_help_says_and_all_of_a_module_are_listed():
    import typer.main

    from crm.cli import COMMANDS, app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {commands[name].name for name in commands} == set(COMMANDS)
    for module in {module for module, _ in COMMANDS.values()}:
        part = typer.Typer()
        import_module(f"crm.cli.{module}").add_to(part)
        assert set(typer.main.get_group(part).commands) == {name for name in COMMANDS if COMMANDS[name][0] == module}


@pytest.mark.parametrize("module", modules("analysis"))
def test_analysis_starts_without_torch(module):
    assert not loaded(module) & {"torch", "torchvision", "timm", "mlflow"}


def test_training_starts_without_the_tracking_and_scheduling_libraries():
    # What a worker does not import cannot stop or slow it.
    assert not loaded("crm.train") & {"mlflow", "optuna", "submitit", "pandas"}


def test_every_setting_is_read_by_the_library():
    nodes = [
        node
        for module in modules("crm")
        if module != "crm.config"
        for node in ast.walk(ast.parse(source(module).read_text()))
    ]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    # A part spread into arguments, f(**asdict(config.masking)), is read whole: f would refuse a name it does not take.
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "asdict" and node.args]
    spread = {ast.unparse(call.args[0]).removeprefix("config.") for call in calls}
    dead = [path for path in flatten(Config()) if path.rpartition(".")[2] not in read]
    assert not [path for path in dead if path.partition(".")[0] not in spread]


# ---------------------------------------------------------------------------------------------- packaging

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "constraints.txt").read_text().splitlines()
NAMES_OF_MODULES = {"PIL": "pillow", "sklearn": "scikit-learn"}  # where a package is not named like its module


def test_the_lock_holds_names_and_versions_only():
    assert [line for line in LOCK if not re.fullmatch(r"[a-z0-9]+(?:-[a-z0-9]+)*==[0-9][0-9a-z.]*", line)] == []
    names = [line.partition("==")[0] for line in LOCK]
    assert names == sorted(set(names))


def declared(*extras: str) -> set[str]:
    """Distribution names of the dependencies and of these extras."""
    lists = [PROJECT["project"]["dependencies"], *(PROJECT["project"]["optional-dependencies"][one] for one in extras)]
    return {re.split(r"[<>=!~\[; ]", line)[0] for lines in lists for line in lines} - {PROJECT["project"]["name"]}


def test_the_lock_names_every_declared_dependency():
    extras = PROJECT["project"]["optional-dependencies"]
    assert not declared(*extras) - {line.partition("==")[0] for line in LOCK}


@pytest.mark.parametrize(("folders", "extras"), [(LAYERS, ()), (("tests",), ("test",))])
def test_what_is_imported_by_name_is_declared(folders, extras):
    own = {*LAYERS, "tests", "benchmarks", "conftest", *sys.stdlib_module_names}
    named = {name.partition(".")[0] for module in modules(*folders) for name, _ in imports(module)} - own
    assert not {NAMES_OF_MODULES.get(name, name) for name in named} - declared(*extras)


TRACKED = ("analysis", "benchmarks", "crm", "experiments", "sweeps", "tests", ".ci")


def texts() -> Iterator[Path]:
    """The project's own text files."""
    inside = (path for folder in TRACKED for path in (ROOT / folder).rglob("*"))
    own = {*ROOT.glob("*.*")} - {ROOT / ".git"}  # a file in a worktree, and git's
    for path in (*own, ROOT / "Makefile", *inside):
        if path.is_file() and path.suffix not in (".pyc", ".npz", ".png", ".safetensors", ".gz"):
            yield path


def test_no_file_names_a_place_outside_the_project():
    outside = re.compile(r"(?<![\w.$~}*-])/(?:opt|work|home|root|Users|mnt|srv|scratch)" + r"/\w")
    # Outside test data has its defaults in one file, under these two names.
    allowed = re.compile(r"CRM_GOLDEN|CRM_REAL_DATA")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if outside.search(line) and not (path.name == "conftest.py" and allowed.search(line))
    ]
    assert not found
