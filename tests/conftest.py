"""What every test shares."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

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
