"""Functions whose optimum is known, and a coordinator of one as a process that can be killed.

python -m tests.tune_case RUNS STORAGE TRIALS
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from crm.config import Config
from crm.search import Choice, Number, Search, Weight

if TYPE_CHECKING:
    from crm.tuning.coordinator import Summary


def bowl(values: dict) -> float:
    """Best, 0, at x = 0.3, y = -1."""
    return -((values["x"] - 0.3) ** 2) - (values["y"] + 1) ** 2


def slow_bowl(values: dict) -> float:
    time.sleep(0.4)
    return bowl(values)


def two(values: dict) -> tuple[float, float]:
    """The front is 0 <= x <= 1, where their sum is 1."""
    x = values["x"]
    over = max(0.0, -x, x - 1)
    return x - 3 * over, 1 - x - 3 * over


def switch(values: dict) -> float:
    """Best with the weight off and the kind b."""
    return -values["weight"] + (values["kind"] == "b")


def wrong(values: dict) -> float:
    raise ZeroDivisionError("always")


SPACE = {"x": Number(-1.0, 1.0), "y": Number(-2.0, 2.0)}
BOWL = Search(Config(), SPACE, bowl)
SLOW = Search(Config(), SPACE, slow_bowl)
TWO = Search(Config(), {"x": Number(-1.0, 2.0)}, two, values=2)
SWITCH = Search(Config(), {"weight": Weight(0.1, 10), "kind": Choice(("a", "b"))}, switch)
WRONG = Search(Config(), SPACE, wrong)


def searched(
    search: Search, runs: Path, trials: int, storage: str = "sqlite", name: str = "study", workers: int = 2, **more
) -> "Summary":
    # here, since each value is computed by a process that finds its function in this module, and needs none of it
    from crm.tuning.coordinator import tune
    from crm.tuning.folder import Asked, folder_of, signature
    from crm.tuning.storage import location
    from crm.tuning.work import Calculations

    folder = folder_of(runs, name)
    asked = Asked(
        search="", storage=location(folder.path, storage, "local"), trials=trials, signature=signature(search),
        objectives=search.objectives, **more,
    )  # fmt: skip
    return tune(search, folder, asked, Calculations(search, folder), workers=workers)


if __name__ == "__main__":
    from tests import tune_case  # under its own name, so that other processes find the function

    print(searched(tune_case.SLOW, Path(sys.argv[1]), int(sys.argv[3]), sys.argv[2]))
