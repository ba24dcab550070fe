"""One optimiser step of a run: forward and backward in as many parts as the machine wants, then one descent.

A step is a function of (seed, step). Its numbers stay on the device until somebody looks at them: of all that a step
does, only the matching, which is solved on the host, waits for the device (`crm.matching.assign`). Micro-batches and
processes are parts of its batch: their losses and gradients add up to those of the whole (to rounding; with
micro-batches BatchNorm sees each of them alone).

b = images of this process, B = images of the whole batch, h w = tokens
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from crm import distributed
from crm.config import Config
from crm.data.specs import DatasetSpec
from crm.data.transforms import Batch
from crm.faults import strikes
from crm.machine import Machine, allow_tf32
from crm.masking import training_masks
from crm.model.backbone import PATCH, drawn_for
from crm.model.segmenter import Segmenter, build_segmenter
from crm.objective import View, objective
from crm.optim import build_optimizer, follow, rate
from crm.passes import drawn_passes
from crm.points import RandomPoints
from crm.randomness import derive
from crm.targets import Part, Targets, make_targets
from crm.transfer import sent


class RunFailed(RuntimeError):
    """Training cannot go on, for a reason that stands in the message."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step came to; losses are those of the whole batch."""

    terms: dict[str, float]
    details: dict[str, float]
    grad_norm: float  # before clipping
    lr: float  # the highest of any group
    hidden: dict[str, float]  # share of tokens hidden in "rgb", in "thermal", and in "both" at the same place

    @property
    def total(self) -> float:
        return sum(self.terms.values())


class Late:
    """A step that was taken, whose numbers may still be on the device."""

    def __init__(self, number: int, names: list[str], values: Tensor, lr: float, masks: Tensor | None) -> None:
        """Fetches nothing.

        Args:
            names: of the terms and details, which `values` begins with; it ends with a norm for each network.
        """
        self.number, self._names, self._values, self._lr, self._masks = number, names, values, lr, masks

    @cached_property
    def step(self) -> Step:
        """Its numbers; the first time, this waits for the device."""
        values = self._values.tolist()
        found = dict(zip(self._names, values, strict=False))
        return Step(
            terms={name: value for name, value in found.items() if "/" not in name},
            details={name: value for name, value in found.items() if "/" in name},
            grad_norm=math.hypot(*values[len(found) :]),
            lr=self._lr,
            hidden=_shares(self._masks),
        )

    def check(self) -> None:
        """Raises RunFailed if the loss or the gradient is not finite, with the step and the terms."""
        if not math.isfinite(self.step.total):
            raise _not_finite("loss", self.step.terms, self.number)
        if not math.isfinite(self.step.grad_norm):
            raise _not_finite("gradient", self.step.terms, self.number)


class Trainer:
    """A network in training, with its optimiser and, if configured, the running average of its weights."""

    def __init__(self, config: Config, machine: Machine, spec: DatasetSpec, epoch_steps: int) -> None:
        """A network from scratch, as every run of this seed begins.

        Args:
            epoch_steps: steps of one pass over the training images.
        """
        self.config, self.machine, self.spec, self.epoch_steps = config, machine, spec, epoch_steps
        self.places = distributed.share(config.batch)
        self.unchecked: list[Late] = []  # steps whose numbers nobody has looked at
        torch.manual_seed(derive(config.seed, "initialisation"))
        self.model = build_segmenter(config.model, spec.num_classes).to(machine.device)
        self._prepare()

    def _prepare(self) -> None:
        """How the machine computes the network: none of it changes what is computed."""
        if self.machine.channels_last:
            self.model.to(memory_format=torch.channels_last)  # pyright: ignore - an overload that Module.to lacks
        self.model.recompute(self.machine.recompute)
        self.model.half_precision(self.machine.precision == "bf16")
        if self.machine.compile:
            from torch._inductor import config as inductor  # noqa: PLC0415 - loads a compiler, which takes seconds

            torch._dynamo.config.recompile_limit = 64  # each part of a batch has its own place in it
            inductor.fallback_random = True  # the draws of stochastic depth stay those of a run that is not compiled
            # what these functions return is the same at every call, so tracing through their cache is right
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
            self.model.compile_parts()

    def begin(self) -> None:
        """To be called when the weights are those that training starts from."""
        self.optimizer = build_optimizer(self.model, self.config.optim)
        decay = self.config.optim.ema
        # the average has buffers as they are now; only parameters are averaged
        self.average = AveragedModel(self.model) if decay else None

    @property
    def evaluated(self) -> Segmenter:
        """The network that validation and evaluation look at: the average of the weights, where there is one."""
        network = self.model if self.average is None else self.average.module
        assert isinstance(network, Segmenter)
        return network

    def step(self, batch: Batch, number: int) -> Step:
        """Step `number` on this process's images of it, and its numbers.

        Raises RunFailed if the loss or the gradient is not finite, with the step and the terms.
        """
        taken = self.advance(batch, number)
        self.check()
        return taken.step

    def check(self) -> None:
        """Raises RunFailed for the first step since the last check whose loss or gradient is not finite.

        To be called before anything is made of the weights: they may be spoilt since.
        """
        unchecked, self.unchecked = self.unchecked, []
        for taken in unchecked:
            taken.check()

    def advance(self, batch: Batch, number: int) -> Late:
        """Step `number` on this process's images of it, without waiting for its numbers: `check` looks at them."""
        config = self.config
        if strikes("memory", "step"):
            raise torch.OutOfMemoryError("CRM_FAULT asked for it")
        self.model.train()
        masks = training_masks(config, (batch.image.shape[2], batch.image.shape[3]), number)
        targets, counts = self._targets(batch)
        device = self.machine.device
        image = sent(batch.image, device)
        view = None if batch.view is None else View(sent(batch.view.image, device), *self._targets(batch.view))
        hidden = None if masks is None else sent(masks[self.places.start : self.places.stop], device)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for images in self._parts(len(image)):
            part = Part(self.places.start + images.start, counts)
            with drawn_for(part.first, images.stop - images.start, len(counts)):
                found = self._losses(image[images], None if hidden is None else hidden[images],
                                     targets.part(images), view and view.part(images), part, number)  # fmt: skip
            for name, value in found.items():
                sums[name] = sums[name] + value if name in sums else value
        values = distributed.add_up(torch.stack(list(sums.values())))
        distributed.add_up_gradients(self.model)
        norms = [nn.utils.clip_grad_norm_(part, config.optim.clip) for part in self.model.networks]
        factor = rate(number, config.steps, self.epoch_steps, config.optim)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.step()
        if self.average is not None:
            follow(self.average, self.model, config.optim.ema)
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        taken = Late(number, list(sums), torch.cat([values, torch.stack(norms)]), lr, masks)
        self.unchecked.append(taken)
        return taken

    def _losses(
        self, image: Tensor, hidden: Tensor | None, targets: Targets, view: View | None, part: Part, number: int
    ) -> dict[str, Tensor]:
        """Terms and details of one part of the batch, after its backward pass."""
        seed, device = self.config.seed, self.machine.device
        torch.manual_seed(derive(seed, number, "drop path"))
        points = RandomPoints(torch.Generator(device).manual_seed(derive(seed, number, "points")))
        try:
            with self._autocast(), self._tf32():
                losses = objective(
                    self.model,
                    image,
                    hidden,
                    targets,
                    self.config.loss,
                    points,
                    self._head_passes(image),
                    part,
                    view=view,
                    fill=self.config.masking.fill,
                    teacher=self.evaluated if self.config.loss.teacher == "ema" else None,
                    factors=drawn_passes(self.config.loss.passes, seed, number),
                    backward=True,
                )
        except FloatingPointError as error:  # the matching meets nan before the loss does
            self.check()  # maybe a step before this one has spoilt the weights
            raise RunFailed(f"step {number}: {error}") from error
        return losses.terms | losses.details

    def _head_passes(self, image: Tensor) -> str:
        if self.machine.head_passes == "auto" and self.config.model.inputs == "late":
            return "batched"  # how many queries an image has there depends on what else is in the batch
        tokens = image.shape[2] * image.shape[3] // PATCH**2
        return self.machine.passes_through_head(len(image), tokens, self.config.model.width)

    def _autocast(self) -> torch.autocast:
        kind = self.machine.device.partition(":")[0]
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.machine.precision == "bf16")

    @contextmanager
    def _tf32(self) -> Iterator[None]:
        """Inside, TF32 is allowed if this is its precision; validation and evaluation are in float32."""
        allow_tf32(self.machine.precision == "tf32")
        try:
            yield
        finally:
            allow_tf32(False)

    def _parts(self, images: int) -> Iterator[slice]:
        """This process's images, cut into micro-batches."""
        size = self.machine.micro_batch or images
        for start in range(0, images, size):
            yield slice(start, min(start + size, images))

    def _targets(self, batch: Batch) -> tuple[Targets, tuple[int, ...]]:
        """The targets of these images, and how many classes every image of the whole batch has."""
        targets = make_targets(batch.label, self.spec.num_classes, self.spec.ignore_index, valid=batch.valid)
        return targets.to(self.machine.device), self._counts(targets)

    def _counts(self, targets: Targets) -> tuple[int, ...]:
        """Classes present in every image of the whole batch, those of other processes too."""
        mine = torch.zeros(self.config.batch, dtype=torch.int64)
        mine[self.places.start : self.places.stop] = torch.tensor([len(present) for present in targets.classes])
        if distributed.world().size == 1:
            return tuple(mine.tolist())
        return tuple(distributed.add_up(mine.to(self.machine.device)).tolist())  # every process waits here


def _shares(masks: Tensor | None) -> dict[str, float]:
    """Shares of the tokens of a whole batch that are hidden."""
    if masks is None:
        return {"rgb": 0.0, "thermal": 0.0, "both": 0.0}
    shares = torch.cat([masks, masks.all(dim=1, keepdim=True)], dim=1).float().mean(dim=(0, 2, 3))
    return dict(zip(("rgb", "thermal", "both"), shares.tolist(), strict=True))


def _not_finite(what: str, terms: dict[str, float], number: int) -> RunFailed:
    found = ", ".join(f"{name} {value:g}" for name, value in terms.items())
    return RunFailed(f"the {what} is not finite at step {number}: {found}")
