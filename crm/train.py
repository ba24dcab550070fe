"""Training one run: one loop, one counter, every step's randomness a function of (seed, step).

b = batch
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from crm.checkpoint import newest_checkpoint, restore, save_checkpoint
from crm.conditions import Condition
from crm.config import SCHEMA, Config
from crm.confusion import iou
from crm.data.dataset import Split, manifest, open_run_split
from crm.data.transforms import Batch, augment, collate
from crm.evaluate import evaluate
from crm.machine import Machine
from crm.masking import TOKEN, draw_masks
from crm.model.segmenter import Segmenter, build_segmenter
from crm.objective import Losses, make_targets, objective
from crm.optim import build_optimizer, rate
from crm.points import RandomPoints
from crm.provenance import provenance
from crm.randomness import derive
from crm.records import Claim, append, file_hash, journal, read_json, write_bytes, write_json
from crm.weights.initial import initialise

VALIDATION = Condition(split="val")


class RunFailed(RuntimeError):
    """Training cannot go on, for a reason that stands in the message."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a watcher is told after every step."""

    step: int
    steps: int
    total: float  # the loss, weighted sum of `terms`
    terms: dict[str, float]
    miou: float | None  # newest validation mIoU, per cent
    seconds: float  # mean seconds per step of this attempt

    @property
    def eta(self) -> float:
        """Seconds until the last step at the present speed."""
        return (self.steps - self.step) * self.seconds


Tell = Callable[[Progress], None]
Stop = Callable[[], bool]


def train(config: Config, machine: Machine, claim: Claim, stop: Stop, tell: Tell) -> bool:
    """Trains the claimed run to its end, from its newest checkpoint on; False if `stop` asked it to end before.

    Raises RunFailed for a non-finite loss, with its step and terms, and Superseded when another attempt took over.
    """
    folder = claim.folder
    train_split, val_split = (open_run_split(config.data, name, machine.data) for name in ("train", "val"))
    spec = train_split.spec
    torch.manual_seed(derive(config.seed, "initialisation"))
    model = build_segmenter(config.model, spec.num_classes).to(machine.device)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        weights = initialise(model, config.model, machine.weights)
        _write_provenance(folder, machine, weights, train_split, val_split)
    optimizer = build_optimizer(model, config.optim)
    start = 0
    best: dict[str, Any] = {"step": 0, "miou": -math.inf}
    if checkpoint is not None:
        restore(checkpoint, model, optimizer)
        start, best = checkpoint.meta["step"], checkpoint.meta["best"]
    holder = read_json(folder / "claim.json")
    append(folder, "attempt", **{**holder, "step": start, "numerics": machine.numerics()})

    epoch_steps = max(1, len(train_split) // config.batch)
    watch = _Watch(config, machine, folder, tell, start, best["miou"] if best["step"] else None)
    saved = start
    for step in range(start, config.steps):
        began = time.monotonic()
        model.train()
        batch = _batch(config, train_split, step)
        try:
            losses, hidden = _losses(config, machine, model, batch, spec, step)
        except FloatingPointError as error:  # the matching meets nan before the loss does
            raise RunFailed(f"step {step}: {error}") from error
        gradient = _descend(config, model, optimizer, losses, step, epoch_steps)
        done = step + 1
        watch.stepped(done, losses, gradient, optimizer, hidden, time.monotonic() - began)

        if done == config.steps or (config.val_every and done % config.val_every == 0):
            miou = _validate(config, machine, model, val_split, folder, done)
            watch.miou = miou
            if miou > best["miou"]:
                best = {"step": done, "miou": miou}
                claim.check()
                save_checkpoint(folder / "checkpoints/val_best.safetensors", model, None, {"step": done, "miou": miou})
        stopping = stop()
        if stopping or done == config.steps or done - saved >= machine.checkpoint_every:
            claim.check()
            meta = {"step": done, "best": best, "id": folder.name}
            save_checkpoint(folder / "checkpoints/last.safetensors", model, optimizer, meta)
            saved = done
        if stopping and done < config.steps:
            return False
    _finish(config, folder, claim, model, best)
    return True


# ---------------------------------------------------------------------------------------------- one step


def _batch(config: Config, split: Split, step: int) -> Batch:
    """The images of a step, augmented: a function of (seed, step) and the image's place in the batch."""
    pairs = []
    for place, index in enumerate(_indices(config.seed, len(split), config.batch, step)):
        generator = torch.Generator().manual_seed(derive(config.seed, step, "augment", place))
        pairs.append(augment(split[index], config.data, generator))
    return collate(pairs, split.spec)


def _indices(seed: int, images: int, batch: int, step: int) -> Iterator[int]:
    """The images of a step: each epoch is one permutation, and epochs follow one another without a gap."""
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, images)
        yield _permutation(seed, images, epoch)[place]


_order: dict[tuple[int, int, int], list[int]] = {}


def _permutation(seed: int, images: int, epoch: int) -> list[int]:
    """The order of one epoch; the last two are remembered."""
    key = (seed, images, epoch)
    if key not in _order:
        while len(_order) > 1:
            del _order[next(iter(_order))]
        generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
        _order[key] = torch.randperm(images, generator=generator).tolist()
    return _order[key]


def _losses(
    config: Config, machine: Machine, model: Segmenter, batch: Batch, spec: Any, step: int
) -> tuple[Losses, Tensor | None]:
    """The objective of one batch, and the masks it was computed with."""
    hidden = None
    if config.masking.kind != "none":
        hidden = _masks(config, batch, step).to(machine.device)
    torch.manual_seed(derive(config.seed, step, "drop path"))
    targets = make_targets(batch.label, spec.num_classes, spec.ignore_index, valid=batch.valid).to(machine.device)
    image = batch.image.to(machine.device)
    points = RandomPoints(torch.Generator(machine.device).manual_seed(derive(config.seed, step, "points")))
    return objective(model, image, hidden, targets, config.loss, points, machine.head_passes), hidden


def _masks(config: Config, batch: Batch, step: int) -> Tensor:
    """Tokens hidden at a step, (b, 2, h, w): a function of (seed, step)."""
    how = asdict(config.masking)
    covers_padding = how.pop("cover_padding")
    tokens = (batch.image.shape[2] // TOKEN, batch.image.shape[3] // TOKEN)
    valid = (-(-config.data.crop[0] // TOKEN), -(-config.data.crop[1] // TOKEN))
    generator = torch.Generator().manual_seed(derive(config.seed, step, "mask"))
    return draw_masks(
        batch=len(batch.image), tokens=tokens, valid=None if covers_padding else valid, generator=generator, **how
    )


def _descend(
    config: Config, model: nn.Module, optimizer: Optimizer, losses: Losses, step: int, epoch_steps: int
) -> float:
    """One optimiser step; the gradient norm before clipping. Raises RunFailed if the loss or gradient is not finite."""
    total = losses.total
    if not math.isfinite(total.item()):
        _not_finite("loss", losses, step)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip).item()
    if not math.isfinite(norm):
        _not_finite("gradient", losses, step)
    factor = rate(step, config.steps, epoch_steps, config.optim)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
    optimizer.step()
    return norm


def _not_finite(what: str, losses: Losses, step: int) -> None:
    terms = ", ".join(f"{name} {value.item():g}" for name, value in losses.terms.items())
    raise RunFailed(f"the {what} is not finite at step {step}: {terms}")


# ---------------------------------------------------------------------------------------------- around the loop


def _write_provenance(folder: Path, machine: Machine, weights: dict[str, Any], *splits: Split) -> None:
    if (folder / "provenance.json").exists():
        return
    record = provenance({split.name: manifest(split) for split in splits}, weights, machine.device)
    if diff := record.pop("diff"):
        write_bytes(folder / "uncommitted.diff", diff.encode())
    write_json(folder / "provenance.json", record)


class _Watch:
    """Writes the journal's train lines and progress.json, and tells the watcher."""

    def __init__(self, config: Config, machine: Machine, folder: Path, tell: Tell, start: int, miou: float | None):
        self.config, self.machine, self.folder, self.tell = config, machine, folder, tell
        self.start, self.miou = start, miou
        self.seconds = self.since_line = 0.0
        self.lines_at = start

    def stepped(
        self, step: int, losses: Losses, gradient: float, optimizer: Optimizer, hidden: Tensor | None, seconds: float
    ) -> None:
        self.seconds += seconds
        self.since_line += seconds
        progress = Progress(
            step=step,
            steps=self.config.steps,
            total=losses.total.item(),
            terms={name: value.item() for name, value in losses.terms.items()},
            miou=self.miou,
            seconds=self.seconds / (step - self.start),
        )
        self.tell(progress)
        if step % self.machine.log_every == 0 or step == self.config.steps:
            self._line(progress, losses, gradient, optimizer, hidden)

    def _line(
        self, progress: Progress, losses: Losses, gradient: float, optimizer: Optimizer, hidden: Tensor | None
    ) -> None:
        shares = [0.0, 0.0] if hidden is None else hidden.float().mean(dim=(0, 2, 3)).tolist()
        append(
            self.folder,
            "train",
            step=progress.step,
            total=progress.total,
            terms=progress.terms,
            details={name: value.item() for name, value in losses.details.items()},
            lr=max(group["lr"] for group in optimizer.param_groups),
            grad_norm=gradient,
            seconds=round(self.since_line / (progress.step - self.lines_at), 4),
            hidden={"rgb": shares[0], "thermal": shares[1]},
        )
        write_json(
            self.folder / "progress.json",
            {"step": progress.step, "steps": progress.steps, "loss": progress.total, "miou": self.miou,
             "eta": round(progress.eta, 1), "seconds": round(progress.seconds, 4), "time": time.time()},
        )  # fmt: skip
        self.since_line, self.lines_at = 0.0, progress.step


def _validate(config: Config, machine: Machine, model: Segmenter, split: Split, folder: Path, step: int) -> float:
    """Validation mIoU in per cent, also written to the journal."""
    began = time.monotonic()
    ((_, evaluation),) = evaluate(model, split, [VALIDATION], config.batch, machine.device)
    values = iou(evaluation.confusion.sum(axis=0))
    append(
        folder,
        "val",
        step=step,
        miou=evaluation.miou,
        iou=[None if math.isnan(value) else value for value in values],
        seconds=round(time.monotonic() - began, 3),
    )
    return evaluation.miou


def _finish(config: Config, folder: Path, claim: Claim, model: nn.Module, best: dict[str, Any]) -> None:
    """Writes result.json: its existence means trained."""
    claim.check()
    lines = journal(folder)
    seconds = _spent(lines)
    files = {name: f"checkpoints/{name}.safetensors" for name in ("last", "val_best")}
    write_json(
        folder / "result.json",
        {
            "schema": SCHEMA,
            "id": folder.name,
            "steps": config.steps,
            "miou": next(line["miou"] for line in reversed(lines) if line["event"] == "val"),
            "val_best": best,
            "checkpoints": {name: {"file": file, "sha256": file_hash(folder / file)} for name, file in files.items()},
            "train_seconds": round(seconds, 2),
            "seconds_per_step": round(seconds / config.steps, 5),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "attempts": sum(line["event"] == "attempt" for line in lines),
        },
    )


def _spent(lines: list[dict[str, Any]]) -> float:
    """Seconds of training: each journal line speaks for the steps since the one before."""
    spent, before = 0.0, 0
    for line in sorted((line for line in lines if line["event"] == "train"), key=lambda line: line["step"]):
        spent += line["seconds"] * (line["step"] - before)
        before = line["step"]
    return spent
