"""A smoke test of a configuration: everything a run does, on as little as possible, in no run folder.

Two optimiser steps on real batches, one batch evaluated, the checkpoint written, read and restored. What breaks here
would break every run of the configuration, after hours in a queue.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from crm import distributed
from crm.checkpoint import load_checkpoint, restore, save_checkpoint
from crm.conditions import Condition
from crm.config import Config
from crm.data.dataset import open_run_split, run_splits
from crm.data.loader import batches
from crm.evaluate import evaluate
from crm.machine import Machine
from crm.step import Trainer
from crm.train import refuse_impossible
from crm.weights.initial import initialise

STEPS = 2


def smoke(config: Config, machine: Machine) -> None:
    """Raises what a run of this config would: a missing file, no memory, a loss that is not finite, and so on."""
    machine.take_process()
    splits = {name: open_run_split(config.data, name, machine.data, machine.cache) for name in run_splits(config.data)}
    refuse_impossible(config, machine, {name: len(split) for name, split in splits.items()})
    trainer = _trainer(config, machine, splits)
    initialise(trainer.model, config.model, machine.weights, machine.runs, trainer.spec.classes)
    trainer.begin()
    prepared = batches(config, splits["train"], 0, machine.loader_workers, trainer.places)
    for number in range(STEPS):
        trainer.step(next(prepared), number)
    if distributed.world().chief:
        few = splits["test"].only(range(min(config.batch, len(splits["test"]))))
        for _ in evaluate(trainer.evaluated, few, [Condition(split="test")], config.batch, machine.device):
            pass
        _refuse_lossy(trainer, _trainer(config, replace(machine, compile=False), splits))


def _trainer(config: Config, machine: Machine, splits: dict) -> Trainer:
    return Trainer(config, machine, splits["train"].spec, max(1, len(splits["train"]) // config.batch))


def _refuse_lossy(trainer: Trainer, other: Trainer) -> None:
    """RuntimeError if another network, given the checkpoint of this one, would not be this one."""
    with tempfile.TemporaryDirectory(prefix="crm-smoke-") as scratch:
        path = Path(scratch) / "last.safetensors"
        save_checkpoint(path, trainer, {"step": STEPS})
        other.begin()
        restore(load_checkpoint(path), other)
    theirs = other.model.state_dict()
    for name, tensor in trainer.model.state_dict().items():
        if not torch.equal(tensor, theirs[name]):
            raise RuntimeError(f"a checkpoint does not bring {name} back as it was")
