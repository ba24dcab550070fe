"""What every test shares."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.slurm.cluster import Cluster
    from tests.slurm.project import Home, Project

# Tests run on busy machines, and the first example of a property pays for the imports: no deadline per example.
settings.register_profile("crm", deadline=None, derandomize=True)
settings.load_profile("crm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none; torch is imported only if such a test was collected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# Tensors recorded from the released code, which most machines lack (tests/test_released_*.py).
GOLDEN = Path(os.environ.get("CRM_GOLDEN") or Path(__file__).parents[2] / "shared" / "golden")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of tensors recorded from the released code."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no recorded tensors in {GOLDEN} (set CRM_GOLDEN)")
    return GOLDEN


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real frames named by CRM_REAL_DATA; they may not be redistributed, so most machines lack them."""
    folder = Path(os.environ.get("CRM_REAL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "mfnet" / "test.txt").is_file():
        pytest.skip(f"no real frames in {folder} (set CRM_REAL_DATA)")
    return folder


@pytest.fixture(scope="session")
def slurm_of_this_session() -> Iterator["Cluster"]:
    """A private Slurm of four nodes, whose arrays end at 501 elements."""
    from tests.slurm.cluster import bring_up

    yield from bring_up(CRM_SLURM_MAX_ARRAY="501")


@pytest.fixture
def slurm(slurm_of_this_session: "Cluster") -> Iterator["Cluster"]:
    """The private Slurm with no job in it; SLURM_CONF names it."""
    yield slurm_of_this_session
    slurm_of_this_session.clean()


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> "Project":
    """A copy of the project, with sweeps of seconds, that no test may change."""
    from tests.slurm.project import Project

    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def home(project: "Project", tmp_path: Path) -> "Home":
    """A place for the runs of those sweeps."""
    return project.home(tmp_path / "home")


@pytest.fixture(scope="session")
def in_one_process(project: "Project", tmp_path_factory: pytest.TempPathFactory) -> "Home":
    """The runs of those sweeps, one after another, without any scheduler."""
    home = project.home(tmp_path_factory.mktemp("undisturbed"))
    for name, seeds in (("quick", "0,1"), ("other", "0")):
        home.crm("sweep", name, "--seeds", seeds, "--cluster", "inline", "--yes", "--no-track", "--threads", "1")
    return home


@pytest.fixture
def assert_undisturbed(in_one_process: "Home") -> "Callable[..., None]":
    """Compares finished runs, all of a sweep or some by label, with those that nobody disturbed."""
    from tests.slurm.project import final

    def compare(home: "Home", *labels: str, name: str = "quick") -> None:
        for label in labels or home.states(name):
            folder = home.folder(label, name)
            ours, theirs = final(folder), final(in_one_process.runs / folder.name)
            for part in theirs:
                assert ours[part] == theirs[part], f"{part} of {label} in {folder}\n{home.story()}"

    return compare


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=10, help="how much is killed in tests/chaos")
    parser.addoption("--chaos-seed", type=int, default=0, help="of what is killed in tests/chaos, and when")
