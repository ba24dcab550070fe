"""Checkpoints without pickle: one safetensors file holds weights, optimiser state and the step."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from crm.config import SCHEMA
from crm.records import write_bytes

if TYPE_CHECKING:
    from crm.step import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    weights: dict[str, Tensor]  # of the network that is evaluated
    trained: dict[str, Tensor]  # of the network in training, where that is another: the average is evaluated
    optimizer: dict[str, Tensor]  # empty where only weights were kept
    meta: dict[str, Any]  # step and whatever the writer added


def save_checkpoint(
    path: Path,
    trainer: "Trainer",
    meta: dict[str, Any],
    whole: bool = True,
    check: Callable[[], None] | None = None,
) -> str:
    """Writes atomically, keeps the file before as `<stem>.previous.safetensors`, and returns the SHA-256.

    Args:
        whole: with all that training needs to go on; else only the weights that are evaluated.
        check: may raise just before the file appears.
    """
    tensors = _named("model", trainer.evaluated.state_dict())
    if whole:
        if trainer.average is not None:
            tensors |= _named("trained", trainer.model.state_dict())
        tensors |= _optimizer_tensors(trainer.model, trainer.optimizer)
    return write_checkpoint(path, tensors, meta, check)


def save_weights(path: Path, weights: Mapping[str, Tensor], meta: dict[str, Any]) -> str:
    """A checkpoint of weights alone, as by `save_checkpoint`."""
    return write_checkpoint(path, _named("model", weights), meta)


def write_checkpoint(
    path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], check: Callable[[], None] | None = None
) -> str:
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    content = save(tensors, metadata={"crm": json.dumps({"schema": SCHEMA, "digest": digest(tensors), **meta})})
    if path.exists():
        previous = path.with_name(f"{path.stem}.previous.safetensors")
        previous.unlink(missing_ok=True)
        os.link(path, previous)  # the current file never goes away, not even for a moment
    write_bytes(path, content, check)
    return sha256(content).hexdigest()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes: says whether a file still holds what was written."""
    found = sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Adam's state under the names of its parameters."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads one file. ValueError for a file that is not a whole checkpoint, or not as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["crm"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no whole checkpoint: {error}") from error
    if meta.get("digest") not in (None, digest(tensors)):  # None: from before there was one
        raise ValueError(f"{path} is damaged: it does not hold what was written")
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "trained": {}, "optimizer": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    return Checkpoint(parts["model"], parts["trained"], parts["optimizer"], meta)


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


def restore(checkpoint: Checkpoint, trainer: "Trainer") -> None:
    """Puts weights, their average and the optimiser's state back, bit by bit."""
    trainer.model.load_state_dict(checkpoint.trained or checkpoint.weights)
    if trainer.average is not None:
        trainer.average.module.load_state_dict(checkpoint.weights)
        trainer.average.n_averaged.fill_(checkpoint.meta["step"])
    for name, parameter in trainer.model.named_parameters():
        prefix = f"{name}."
        state = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (value := checkpoint.optimizer.get(prefix + key)) is not None:
                # the fused kernel wants the counter on the device too, and moments in the order of their weights
                state[key] = value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
        if state:
            trainer.optimizer.state[parameter] = state
    torch.manual_seed(0)  # every step seeds itself; nothing may depend on what is left over here
