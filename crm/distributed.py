"""Several processes at one run: who they are, and the few things they say to each other.

Processes are started by torchrun or as the tasks of a Slurm step. Each takes its share of every batch; what they add up
is the step of one process with the whole batch. The first one, the chief, alone writes. With one process every function
here does nothing.
"""

import os
import subprocess
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crm.names import chosen

TIMEOUT = timedelta(hours=12)  # what a process waits for another before it gives up: an evaluation by the first one
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    local: int = 0  # number of the process on its node

    @property
    def chief(self) -> bool:
        return self.rank == 0


def announced() -> World:
    """What the launcher says: torchrun's variables, else those of a Slurm step with several tasks."""
    found = os.environ
    if "TORCHELASTIC_RUN_ID" in found or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= found.keys():
        return World(int(found["RANK"]), int(found["WORLD_SIZE"]), int(found.get("LOCAL_RANK", 0)))
    if int(found.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in found:
        return World(int(found["SLURM_PROCID"]), int(found["SLURM_STEP_NUM_TASKS"]), int(found["SLURM_LOCALID"]))
    return World()


def join(device: str) -> World:
    """Meets the other processes, once; returns at once where there are none."""
    world = announced()
    if world.size > 1 and not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_node(os.environ["SLURM_STEP_NODELIST"])
            os.environ["MASTER_PORT"] = str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000)
        backend = chosen("device", device.partition(":")[0], BACKENDS)
        if backend == "nccl":
            torch.cuda.set_device(own_gpu(device, world, torch.cuda.device_count()))
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    return world


def own_gpu(device: str, world: World, count: int) -> int:
    """The GPU of this process among those it sees; ValueError if all processes are to share one.

    torchrun shows every process all GPUs of the node, Slurm may show each its own alone.
    """
    if ":" in device:
        raise ValueError(f"several processes of a run take a GPU each: --device cuda, not {device}")
    return world.local % max(1, count)


def _first_node(nodes: str) -> str:
    """The first of a Slurm node list such as n[1-4]."""
    found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return found.stdout.split()[0]


def leave() -> None:
    """Ends what `join` began, when all have come here: who leaves early takes the others' connections away."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def world() -> World:
    """This process among those that have met."""
    if not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), announced().local)


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place; not differentiable."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_of(flag: bool) -> bool:
    """Whether any process says so."""
    if not dist.is_initialized():
        return flag
    found = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found)
    return bool(found.item())


def gathered(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agreed(value: Any) -> Any:
    """The chief's value, for all."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def add_up_gradients(model: nn.Module) -> None:
    """Each parameter's gradient becomes the sum over all processes.

    A parameter that has none in any process keeps none, so that the optimiser leaves it alone as with one process.
    """
    if not dist.is_initialized():
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    there = add_up(there.to(parameters[0].device)).tolist()
    used = [parameter for parameter, count in zip(parameters, there, strict=True) if count]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in used if parameter.grad is not None]
    flat = add_up(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def share(count: int) -> range:
    """The places of a batch of `count` images that are this process's; sizes differ by one at most."""
    mine = world()
    return range(count * mine.rank // mine.size, count * (mine.rank + 1) // mine.size)
