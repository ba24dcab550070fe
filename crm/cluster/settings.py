"""What a job asks the cluster for: defaults, then cluster.toml below the home folder, then `--slurm NAME=VALUE`."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from crm.names import unknown

FILE = "cluster.toml"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Of one run's job. An empty text leaves the choice to the cluster."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    gres: str = ""  # as in gpu:1
    exclude: str = ""  # nodes
    cpus: int = 4  # of one task; also the CPU threads of a run
    memory_gb: float = 16.0  # of one node
    minutes: int = 240  # a run that needs longer goes on in another job
    nodes: int = 1
    tasks: int = 1  # processes of one run on each node; they share every batch
    throttle: int = 0  # runs at once; 0 is as many as the cluster lets
    device: str = "cuda"  # on which a run is computed: cpu or cuda
    setup: tuple[str, ...] = ()  # shell lines before Python starts, such as module loads; a failing one fails the job
    reserve_seconds: int = 90  # before the end of its time a run writes its checkpoint and leaves
    warning_seconds: int = 120  # before the end of its time Slurm sends SIGUSR2
    max_memory_gb: float = 128.0  # to which more memory is asked for, when a run was killed for lack of it
    breaker: int = 2  # runs with the same traceback, after which the others are held

    def __post_init__(self) -> None:
        for name in ("cpus", "minutes", "nodes", "tasks", "breaker"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.memory_gb <= 0 or min(self.throttle, self.reserve_seconds, self.warning_seconds) < 0:
            raise ValueError("memory_gb must be positive; throttle and the seconds must not be negative")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device of a cluster's job is cpu or cuda, not {self.device!r}")
        if self.reserve_seconds >= 60 * self.minutes:
            raise ValueError(f"reserve_seconds {self.reserve_seconds} leaves nothing of minutes {self.minutes}")

    @property
    def processes(self) -> int:
        return self.nodes * self.tasks


def resources(home: Path, given: Sequence[str] = ()) -> Resources:
    """What the user's file says, changed by `given` texts NAME=VALUE; ValueError names wrong keys and valid ones."""
    path = home / FILE
    found = Resources()
    if path.is_file():
        try:
            written = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is no TOML: {error}") from error
        found = changed(found, written, f"key in {path}")
    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--slurm takes NAME=VALUE, as in partition=gpu, not {text!r}")
        pairs[name.strip()] = value.strip()
    return changed(found, pairs, "--slurm setting")


def changed(base: Resources, values: Mapping[str, Any], what: str) -> Resources:
    """`base` with other values, texts turned into the type of the field."""
    known = {field.name: getattr(base, field.name) for field in fields(base)}
    for name in values:
        if name not in known:
            raise unknown(what, name, known)
    return replace(base, **{name: _typed(name, value, known[name], what) for name, value in values.items()})


def _typed(name: str, value: Any, now: Any, what: str) -> Any:
    """The value with the type that the field has now."""
    if isinstance(now, tuple):
        lines = [value] if isinstance(value, str) else value
        if isinstance(lines, list) and all(isinstance(line, str) for line in lines):
            return tuple(lines)
        raise ValueError(f"{what} {name} takes a list of texts, not {value!r}")
    if isinstance(value, type(now)) and not isinstance(value, bool):
        return value
    try:
        if isinstance(now, str) or isinstance(value, bool):
            raise ValueError
        return type(now)(value)
    except (TypeError, ValueError):
        kind = {str: "a text", int: "a whole number", float: "a number"}[type(now)]
        raise ValueError(f"{what} {name} takes {kind}, not {value!r}") from None


TEMPLATE = """\
# What crm asks a Slurm cluster for. Uncomment what your cluster needs; for one call a value is changed by
# `crm sweep NAME --cluster slurm --slurm KEY=VALUE`. Written by `crm init cluster`.

# partition = "gpu"         # sinfo names them
# account = ""
# qos = ""
# constraint = ""           # features of nodes, as in "a100|h100"
# gres = "gpu:1"
# exclude = ""              # nodes to stay away from
# cpus = 4                  # of one task; also the CPU threads of a run
# memory_gb = 16            # of one node
# minutes = 240             # a run that needs longer goes on in another job, from its checkpoint
# nodes = 1
# tasks = 1                 # processes of one run on each node; they share every batch
# throttle = 0              # runs at once; 0 is as many as the cluster lets
# device = "cuda"           # or "cpu"
# setup = [                 # shell lines before Python starts; a failing line fails the job
#     "module load cuda",
# ]
# reserve_seconds = 90      # before the end of its time a run writes its checkpoint and leaves: more than a step and
#                           # a checkpoint take
# warning_seconds = 120     # before the end of its time Slurm sends SIGUSR2
# max_memory_gb = 128       # up to which more memory is asked for, when a run was killed for lack of it
# breaker = 2               # runs that fail with the same traceback, after which the others are held
"""
