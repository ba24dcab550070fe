"""Where and with what a run is computed: nothing here changes what it computes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Machine:
    runs: Path  # folder of the run folders
    data: Path | None = None  # a data set's own folder, or one that holds several
    weights: Path | None = None  # folder of the files that model.init names
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


def initial_file(init: str, weights: Path | None) -> Path | None:
    """The file that `model.init` names, None for "none"; FileNotFoundError says how to get it."""
    if init == "none":
        return None
    path = (weights or home() / "weights") / f"{init}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in path.parent.glob("*.safetensors"))) or "none"
        raise FileNotFoundError(
            f"{path} is missing, and model.init names it (there: {there}). Get {init}.pth from "
            "https://github.com/microsoft/Swin-Transformer, or the file of that name from timm, then: "
            f"crm weights import FILE --name {init}. To train from scratch: --set model.init=none"
        )
    return path


def home() -> Path:
    """The folder that holds runs/, reports/ and data/: `CRM_HOME`, or the current folder."""
    return Path(os.environ.get("CRM_HOME") or ".")


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))
