"""What every test shares."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.slurm.cluster import Cluster

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
def slurm_of_this_session(worker_number: int) -> Iterator["Cluster"]:
    """A private Slurm of four nodes, whose arrays end at 501 elements."""
    from tests.slurm.cluster import bring_up

    yield from bring_up(worker_number, CRM_SLURM_MAX_ARRAY="501")


@pytest.fixture(scope="session")
def worker_number() -> int:
    """Which of the processes is this that pytest-xdist shares the tests among."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


@pytest.fixture
def slurm(slurm_of_this_session: "Cluster") -> Iterator["Cluster"]:
    """The private Slurm with no job in it; SLURM_CONF names it."""
    yield slurm_of_this_session
    slurm_of_this_session.clean()
