"""Checkpoints without pickle: one safetensors file holds weights, optimiser state and the step."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from crm.config import SCHEMA
from crm.records import file_hash, write_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # empty where only weights were kept
    meta: dict[str, Any]  # step and whatever the writer added


def save_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer | None, meta: dict[str, Any]) -> str:
    """Writes atomically, keeps the file before as `<stem>.previous.safetensors`, and returns the SHA-256."""
    tensors = {f"model.{name}": _plain(tensor) for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        tensors |= _optimizer_tensors(model, optimizer)
    content = save(tensors, metadata={"crm": json.dumps({"schema": SCHEMA, **meta})})
    if path.exists():
        previous = path.with_name(f"{path.stem}.previous.safetensors")
        previous.unlink(missing_ok=True)
        os.link(path, previous)  # the current file never goes away, not even for a moment
    write_bytes(path, content)
    return file_hash(path)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Adam's state under the names of its parameters."""
    named = {
        f"optimizer.{name}.{key}": _plain(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return named


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads one file. ValueError for a file that is not a whole checkpoint."""
    weights: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["crm"])
            for key in file.keys():  # noqa: SIM118 - not a dict
                kind, _, name = key.partition(".")
                (weights if kind == "model" else state)[name] = file.get_tensor(key)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no whole checkpoint: {error}") from error
    return Checkpoint(weights, state, meta)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """`last`, or the one before where the last is damaged, or None where the run has none."""
    for name in ("last.safetensors", "last.previous.safetensors"):
        path = folder / "checkpoints" / name
        if not path.exists():
            continue
        try:
            return load_checkpoint(path)
        except ValueError as error:
            log.warning("%s; falling back to the one before", error)
    return None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Puts weights and optimiser state back, bit by bit."""
    model.load_state_dict(checkpoint.weights)
    for name, parameter in model.named_parameters():
        prefix = f"{name}."
        state = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (value := checkpoint.optimizer.get(prefix + key)) is not None:
                state[key] = value if key == "step" else value.to(parameter.device)
        if state:
            optimizer.state[parameter] = state
    torch.manual_seed(0)  # every step seeds itself; nothing may depend on what is left over here
