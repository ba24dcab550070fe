"""Where and with what a run is computed: nothing here changes what it computes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Machine:
    runs: Path  # folder of the run folders
    data: Path | None = None  # a data set's own folder, or one that holds several
    device: str = "cpu"  # cpu, cuda or cuda:N
    threads: int = 1  # CPU threads of one run
    head_passes: Literal["batched", "streamed"] = (
        "batched"  # or "streamed": one after another, less memory, equal to rounding
    )
    checkpoint_every: int = 100  # steps; what a kill costs at most
    log_every: int = 10  # steps between journal lines

    def numerics(self) -> dict[str, str | int]:
        """What bit identity depends on; recorded by a run's first attempt and used by all later ones."""
        return {"device": self.device, "threads": self.threads, "head_passes": self.head_passes}


def home() -> Path:
    """The folder that holds runs/, reports/ and data/: `CRM_HOME`, or the current folder."""
    return Path(os.environ.get("CRM_HOME") or ".")


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))
