"""Training one run: one loop, one counter, every step's randomness a function of (seed, step)."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from crm import distributed
from crm.checkpoint import newest_checkpoint, restore, save_checkpoint
from crm.conditions import Condition
from crm.config import SCHEMA, Config
from crm.confusion import iou, miou, released_miou
from crm.data.dataset import Split, manifest, open_run_split, run_splits
from crm.data.loader import batches
from crm.evaluate import evaluate
from crm.fingerprint import FILE as CODE
from crm.machine import Machine
from crm.provenance import provenance
from crm.records import Claim, append, file_hash, journal, read_json, write_bytes, write_json
from crm.step import Late, Step, Trainer
from crm.system import Load
from crm.weights.initial import initialise

CHOSEN_ON = {"val_best": "val", "test_best": "test"}  # a checkpoint, and the split whose best score it has


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a watcher is told after every step."""

    step: int
    steps: int
    taken: Late
    miou: float | None  # newest validation mIoU, per cent
    seconds: float  # mean seconds per step of this attempt

    @property
    def total(self) -> float:
        """The loss, weighted sum of `terms`; who asks waits for the device."""
        return self.taken.step.total

    @property
    def terms(self) -> dict[str, float]:
        return self.taken.step.terms

    @property
    def eta(self) -> float:
        """Seconds until the last step at the present speed."""
        return (self.steps - self.step) * self.seconds


Tell = Callable[[Progress], None]
Stop = Callable[[], bool]


def train(config: Config, machine: Machine, claim: Claim, stop: Stop, tell: Tell) -> bool:
    """Trains the claimed run to its end, from its newest checkpoint on; False if `stop` asked it to end before.

    With several processes all of them call this; only the first one writes and tells. Raises RunFailed for a
    non-finite loss, with its step and terms, and Superseded when another attempt took over.
    """
    folder, chief = claim.folder, distributed.world().chief
    names = [name for name in run_splits(config.data) if name != "test" or config.test_best]
    splits = {name: open_run_split(config.data, name, machine.data, machine.cache) for name in names}
    refuse_impossible(config, machine, {name: len(split) for name, split in splits.items()})
    trainer = Trainer(config, machine, splits["train"].spec, max(1, len(splits["train"]) // config.batch))
    checkpoint = newest_checkpoint(folder)
    weights = {} if checkpoint else _initialise(trainer, machine)
    trainer.begin()
    best = {name: {"step": 0, "miou": None} for name, split in CHOSEN_ON.items() if split in splits}
    start = 0
    if checkpoint is not None:
        restore(checkpoint, trainer)
        start, best = checkpoint.meta["step"], checkpoint.meta["best"]
        _refuse_other_data(folder, *splits.values())
    elif chief:
        _write_provenance(folder, machine, weights, *splits.values())
    if chief:
        append(folder, "attempt", **{**read_json(folder / "claim.json"), "step": start, "numerics": machine.numerics()})

    watch = _Watch(config, machine, claim, tell, start, best.get("val_best", {}).get("miou"))
    prepared = batches(config, splits["train"], start, machine.loader_workers, trainer.places)
    saved = start
    for number in range(start, config.steps):
        began = time.monotonic()
        taken = trainer.advance(next(prepared), number)
        done = number + 1
        if done == config.steps or done % machine.log_every == 0:
            trainer.check()
        if chief:
            watch.stepped(done, taken, time.monotonic() - began)

        if done == config.steps or (config.val_every and done % config.val_every == 0):
            trainer.check()
            for name in best:
                score = _choose(name, trainer, splits[CHOSEN_ON[name]], claim, done, best)
                if name == "val_best":
                    watch.miou, watch.best = score, best[name]["miou"]
        stopping = distributed.any_of(stop())
        if stopping or done == config.steps or done - saved >= machine.checkpoint_every:
            trainer.check()
            _save(claim, "last", trainer, {"step": done, "best": best, "id": folder.name}, whole=True)
            saved = done
        if stopping and done < config.steps:
            return False
    if chief:
        _finish(config, folder, claim, trainer.model, best)
    return True


def _initialise(trainer: Trainer, machine: Machine) -> dict[str, Any]:
    """Fills a new network with what training starts from; what it says for provenance."""
    return initialise(trainer.model, trainer.config.model, machine.weights, machine.runs, trainer.spec.classes)


def refuse_impossible(config: Config, machine: Machine, images: Mapping[str, int]) -> None:
    """ValueError for a run that could not take its first step; `images` are the sizes of its splits."""
    processes, batch = machine.processes, config.batch
    if batch < processes:
        raise ValueError(f"batch {batch} is smaller than the {processes} processes")
    if machine.micro_batch and batch % processes:
        raise ValueError(
            f"with micro_batch every process needs as many images, and batch {batch} does not divide by {processes}"
        )
    if config.test_best and images["test"] < batch:
        raise ValueError(f"test_best chooses on whole batches of {batch}, and test has {images['test']} images")
    if config.data.drop_last and images["train"] < batch:
        raise ValueError(f"data.drop_last leaves nothing of {images['train']} frames in batches of {batch}")


def _save(claim: Claim, name: str, trainer: Trainer, meta: dict[str, Any], whole: bool) -> None:
    """A checkpoint, written by the first process while the claim holds; a whole one can be trained further."""
    if distributed.world().chief:
        claim.check()
        save_checkpoint(claim.folder / "checkpoints" / f"{name}.safetensors", trainer, meta, whole, claim.check)


# ---------------------------------------------------------------------------------------------- choosing checkpoints


def _choose(
    name: str, trainer: Trainer, split: Split, claim: Claim, done: int, best: dict[str, dict[str, Any]]
) -> float:
    """Scores the network, writes the score to the journal, and keeps the checkpoint if it is the best so far."""
    began = time.monotonic()
    matrix = _matrix(trainer, _scored(name, split, trainer.config.batch))
    score = float(released_miou(matrix) if name == "test_best" else miou(matrix))
    if distributed.world().chief:
        append(
            claim.folder,
            split.name,
            step=done,
            miou=score,
            iou=[None if math.isnan(value) else value for value in iou(matrix)],
            seconds=round(time.monotonic() - began, 3),
        )
    if best[name]["miou"] is None or score > best[name]["miou"]:
        best[name] = {"step": done, "miou": score}
        _save(claim, name, trainer, best[name], whole=False)
    return score


def _scored(name: str, split: Split, batch: int) -> Split:
    """The images that choose: all of val, but whole batches alone of test, as in the released code."""
    return split.only(range(len(split) // batch * batch)) if name == "test_best" else split


def _matrix(trainer: Trainer, split: Split) -> np.ndarray:
    """The confusion matrix of a split, every image counted once: each process has its share of them."""
    here = distributed.world()
    mine = split.only(range(here.rank, len(split), here.size))
    total = torch.zeros(split.spec.num_classes, split.spec.num_classes, dtype=torch.int64)
    condition, machine = Condition(split=split.name), trainer.machine
    if len(mine):
        batch = machine.at_once(trainer.config.batch)
        ((_, found),) = evaluate(trainer.evaluated, mine, [condition], batch, machine.device)
        total += torch.from_numpy(found.confusion.sum(axis=0, dtype=np.int64))
    return distributed.add_up(total.to(machine.device)).cpu().numpy()


# ---------------------------------------------------------------------------------------------- around the loop


def _write_provenance(folder: Path, machine: Machine, weights: dict[str, Any], *splits: Split) -> None:
    record = provenance({split.name: manifest(split) for split in splits}, weights, machine.device)
    if machine.device.startswith("cuda"):
        record["hardware"]["gpu"] = torch.cuda.get_device_name(machine.device)
    write_json(folder / CODE, record.pop("code_parts"))
    if diff := record.pop("diff"):
        write_bytes(folder / "uncommitted.diff", diff.encode())
    write_json(folder / "provenance.json", record)


def _refuse_other_data(folder: Path, *splits: Split) -> None:
    """ValueError if the run was begun with other frames."""
    began = (read_json(folder / "provenance.json") or {}).get("data", {})
    for split in splits:
        if split.name in began and began[split.name]["sha256"] != manifest(split)["sha256"]:
            raise ValueError(
                f"{folder} was begun with other frames of {split.name} than those that are there now; give it the same "
                "data, or use another --runs folder"
            )


class _Watch:
    """Writes the journal's train lines and progress.json, and tells the watcher."""

    def __init__(self, config: Config, machine: Machine, claim: Claim, tell: Tell, start: int, miou: float | None):
        self.config, self.machine, self.claim, self.tell = config, machine, claim, tell
        self.start, self.miou, self.best = start, miou, miou
        self.seconds = self.since_line = 0.0
        self.lines_at = start
        self.load = Load(machine.device)

    def stepped(self, done: int, taken: Late, seconds: float) -> None:
        self.seconds += seconds
        self.since_line += seconds
        progress = Progress(
            step=done,
            steps=self.config.steps,
            taken=taken,
            miou=self.miou,
            seconds=self.seconds / (done - self.start),
        )
        self.tell(progress)
        if done % self.machine.log_every == 0 or done == self.config.steps:
            self._line(progress, taken.step)

    def _line(self, progress: Progress, step: Step) -> None:
        self.claim.check()
        append(
            self.claim.folder,
            "train",
            step=progress.step,
            total=progress.total,
            terms=progress.terms,
            details=step.details,
            lr=step.lr,
            grad_norm=step.grad_norm,
            seconds=round(self.since_line / (progress.step - self.lines_at), 4),
            hidden=step.hidden,
        )
        write_json(
            self.claim.folder / "progress.json",
            {"step": progress.step, "steps": progress.steps, "loss": progress.total, "miou": self.miou,
             "best": self.best, "eta": round(progress.eta, 1), "seconds": round(progress.seconds, 4),
             "time": time.time()},
        )  # fmt: skip
        self.since_line, self.lines_at = 0.0, progress.step
        if (measured := self.load.due()) is not None:
            append(self.claim.folder, "system", step=progress.step, **measured)


def _finish(config: Config, folder: Path, claim: Claim, model: nn.Module, best: dict[str, dict[str, Any]]) -> None:
    """Writes result.json: its existence means trained."""
    claim.check()
    lines = journal(folder)
    seconds = _spent(lines)
    files = {name: f"checkpoints/{name}.safetensors" for name in ("last", *best)}
    write_json(
        folder / "result.json",
        {
            "schema": SCHEMA,
            "id": folder.name,
            "steps": config.steps,
            "miou": next((line["miou"] for line in reversed(lines) if line["event"] == "val"), None),
            "val_best": best.get("val_best"),  # None: the data set has no val split
            "test_best": best.get("test_best"),  # None: nothing was chosen on test
            "checkpoints": {name: {"file": file, "sha256": file_hash(folder / file)} for name, file in files.items()},
            "train_seconds": round(seconds, 2),
            "seconds_per_step": round(seconds / config.steps, 5),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "attempts": sum(line["event"] == "attempt" for line in lines),
            "identical": _identical(lines),
        },
    )


def _identical(lines: list[dict[str, Any]]) -> bool:
    """Whether all attempts computed alike, so that the same run elsewhere has the same bits; else it is equivalent.

    A GPU adds gradients of samples in the order in which they come, which is another one every time.
    """
    numerics = [line["numerics"] for line in lines if line["event"] == "attempt"]
    return all(one == numerics[0] and one["device"] == "cpu" for one in numerics)


def _spent(lines: list[dict[str, Any]]) -> float:
    """Seconds of training: each journal line speaks for the steps since the one before."""
    spent, before = 0.0, 0
    for line in sorted((line for line in lines if line["event"] == "train"), key=lambda line: line["step"]):
        spent += line["seconds"] * (line["step"] - before)
        before = line["step"]
    return spent
