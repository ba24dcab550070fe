"""Where and with what a run is computed: nothing here changes what it computes."""

import ctypes
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crm.names import chosen

PRECISIONS = {
    "fp32": "everything in float32",
    "tf32": "matrix products of float32 with 10 bits of mantissa, on a GPU that has them",
    "bf16": "autocast to bfloat16; sampling, norms and residuals of the pixel decoder, matching and losses in float32",
}

# how the up to six paths of a step go through the head; equal to rounding
HEAD_PASSES = {
    "batched": "all together: fewer calls, which a GPU and small networks like",
    "streamed": "one after another, each with its backward pass: the memory of one, which a CPU likes",
    "threaded": "streamed, each thread with images of its own: faster, but each has gradients of its own too",
    "auto": "batched on a GPU, and if a map of all paths fits into a CPU's cache; else threaded, if threads can share "
    "the images evenly; else streamed",
}
CACHE = 2**24  # bytes

# of glibc's mallopt: how much free memory it keeps, and from what size on a block is the system's own, to be given back
TRIM_THRESHOLD, MMAP_THRESHOLD = (-1, 2**31 - 1), (-3, 2**25)


@dataclass(frozen=True, kw_only=True)
class Machine:
    runs: Path  # folder of the run folders
    data: Path | None = None  # a data set's own folder, or one that holds several
    weights: Path | None = None  # folder of the files that model.init names
    cache: Path | None = None  # folder of files with decoded frames, for all processes; None keeps each one's in memory
    device: str = "cpu"  # cpu, cuda or cuda:N
    threads: int = 1  # CPU threads of one run
    processes: int = 1  # that share every batch of one run
    precision: str = "fp32"  # a key of PRECISIONS, of training; evaluation is always in float32
    micro_batch: int = 0  # images of one process computed at once; 0 is all of them. BatchNorm sees these alone
    head_passes: str = "auto"  # a key of HEAD_PASSES
    recompute: bool = False  # activations are computed again in the backward pass: less memory, the same result
    channels_last: bool = False  # memory layout of convolutions
    compile: bool = False  # branches and head through torch.compile; needs a C++ compiler
    checkpoint_every: int = 100  # steps; what a kill costs at most
    log_every: int = 10  # steps between journal lines
    loader_workers: int = 0  # processes that prepare batches ahead of time; 0 is the training process itself

    def __post_init__(self) -> None:
        chosen("precision", self.precision, PRECISIONS)
        chosen("head_passes", self.head_passes, HEAD_PASSES)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be cpu, cuda or cuda:N, not {self.device!r}")
        if min(self.threads, self.processes, self.checkpoint_every, self.log_every) < 1:
            raise ValueError("threads, processes, checkpoint_every and log_every must be at least 1")
        if min(self.micro_batch, self.loader_workers) < 0:
            raise ValueError("micro_batch and loader_workers must not be negative")
        if self.head_passes == "threaded" and not self._can_be_threaded:
            raise ValueError("head_passes threaded is for the device cpu, without recompute and compile")

    @property
    def _can_be_threaded(self) -> bool:
        """Draws that are made again, and compiled code, are those of one thread."""
        return self.device == "cpu" and not self.recompute and not self.compile

    def passes_through_head(self, images: int, tokens: int, width: int) -> str:
        """How, not "auto", for so many images of so many tokens of stride 4, and so many channels."""
        if self.head_passes != "auto":
            return self.head_passes
        largest = 6 * images * tokens * width * 4
        if self.device != "cpu" or largest <= CACHE:
            return "batched"
        return "threaded" if self._can_be_threaded and math.gcd(images, self.threads) > 1 else "streamed"

    def take_process(self) -> None:
        """Sets this process up to compute: its threads, and that it keeps what a step has freed for the next one.

        Memory that is given back after every layer has to be asked for again page by page. Kept, it is not given back
        to other processes either until this one ends. Only glibc can be told.

        ValueError if the device is not there.
        """
        import torch  # commands that only describe machines do without it

        kind, _, number = self.device.partition(":")
        if kind == "cuda":
            if int(number or 0) >= (count := torch.cuda.device_count()):
                found = f"{count} GPU{'s' * (count > 1)}" if count else "no GPU"
                raise ValueError(f"this machine has no {self.device}: PyTorch finds {found} here (crm doctor)")
            allow_tf32(False)
            if number:
                torch.cuda.set_device(int(number))
        torch.set_num_threads(self.threads)
        if tell := getattr(ctypes.CDLL(None), "mallopt", None):
            for setting in (TRIM_THRESHOLD, MMAP_THRESHOLD):
                tell(*setting)

    def at_once(self, images: int) -> int:
        """So many images to evaluate, or on a GPU no more than a micro-batch, where memory is short."""
        return min(images, self.micro_batch) if self.device != "cpu" and self.micro_batch else images

    def numerics(self) -> dict[str, Any]:
        """What bit identity depends on; recorded by a run's first attempt and used by all later ones."""
        return {name: getattr(self, name) for name in NUMERICS} | {"device": self.device.partition(":")[0]}

    def written(self) -> dict[str, Any]:
        """As plain values, for another process; `Machine.read` makes it again."""
        values = asdict(self)
        return values | {name: str(values[name].resolve()) for name in FOLDERS if values[name]}

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> "Machine":
        """The machine that `written` describes."""
        values: dict[str, Any] = dict(written)
        for name in FOLDERS:
            values[name] = Path(values[name]) if values[name] else None
        return cls(**values)


def allow_tf32(on: bool) -> None:
    """Whether a GPU may compute products of float32 with the digits of TF32; PyTorch lets convolutions, if not told."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


FOLDERS = ("runs", "data", "weights", "cache")
NUMERICS = (
    "device", "threads", "processes", "precision", "micro_batch", "head_passes", "recompute", "channels_last",
    "compile",
)  # fmt: skip


def initial_file(init: str, weights: Path | None, runs: Path | None = None) -> Path | None:
    """The file that `model.init` names: of the weights folder, or the last checkpoint of a finished run.

    None for "none". FileNotFoundError says how to get it.
    """
    if init == "none":
        return None
    path = (weights or home() / "weights") / f"{init}.safetensors"
    run = (runs or home() / "runs") / init
    if not path.is_file() and (run / "result.json").is_file():
        path = run / "checkpoints" / "last.safetensors"
    if not path.is_file():
        if (run / "config.json").is_file():
            raise FileNotFoundError(f"model.init names run {init}, which is not finished; crm status shows it")
        if init.startswith("import-"):
            raise FileNotFoundError(
                f"{run} is missing, and model.init names it: a whole network becomes a run of that name by "
                "`crm weights import FOLDER --dataset NAME`. To train from scratch: --from-scratch"
            )
        there = ", ".join(sorted(found.stem for found in path.parent.glob("*.safetensors"))) or "none"
        how = f"crm weights import FILE --name {init}"
        if init.startswith("swin_"):
            where = "from https://github.com/microsoft/Swin-Transformer, or the file of that name from timm"
            how = f"Get {init}.pth {where}, then: {how}"
        else:
            how = f"A Swin comes under that name by `{how}`, a whole network with --dataset NAME besides"
        raise FileNotFoundError(
            f"{path} is missing, and model.init names it (there: {there}). {how}. To train from scratch: --from-scratch"
        )
    return path


def home() -> Path:
    """The folder that holds runs/, reports/ and data/: `CRM_HOME`, or the current folder."""
    return Path(os.environ.get("CRM_HOME") or ".")


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))
