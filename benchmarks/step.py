"""What a training step and an evaluation cost, ours beside an as-released arrangement of the same network.

    python -m benchmarks.step [--rounds 4] [--minutes 12] [--batch 2] [--precision fp32|bf16|both] [--recompute]
                              [--part step|evaluation|both] [--threads N] [--json FILE]

The published Swin-T network with random weights on synthetic scenes: batch 2, 256 x 320 pixels, complementary masks 0.5
of patch 32, 12,544 points; evaluation of one image of 480 x 640. Stochastic depth is off, so that losses can be
compared. `benchmarks.released` is the other side, always in float32. All sides run in one process in turns, with the
same state of the optimiser; the median counts. Processor seconds stand beside wall seconds: where others use the
machine, those are the ones to compare. The memory that a process asks for at first it keeps, and asking takes the
released arrangement, which has the larger blocks, seconds over several steps: so the first rounds are counted by
themselves; then both sides have settled. No round begins that would end after --minutes, except the first.
Memory is the peak of resident memory of a process that takes three such steps of one side and does nothing else.
The ceiling is what one large matrix product of float32 achieves at the same moment.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import released
from crm.config import Config, override
from crm.data.dataset import open_run_split
from crm.data.loader import make_batch
from crm.machine import HEAD_PASSES, Machine, cores
from crm.masking import training_masks
from crm.model.backbone import PATCH, SwinBranch
from crm.model.pixel_decoder import PixelDecoder
from crm.model.query_decoder import QueryDecoder
from crm.model.segmenter import Segmenter, build_segmenter, semantic_scores
from crm.objective import objective
from crm.optim import build_optimizer
from crm.points import RandomPoints, ReleasedPoints
from crm.provenance import PACKAGES, cpu
from crm.targets import Targets, make_targets

CONFIG = override(
    Config(),
    {"data.dataset": "synthetic", "data.train_images": 2, "model.init": "none", "model.drop_path": 0.0, "batch": 2,
     "masking.kind": "complementary", "loss.count_padding": True, "loss.count_ignored": True},
)  # fmt: skip
Side = Callable[["Clock", int], None]  # a turn on so many images
SETTLING = 3  # rounds
REMEMBERED = 3  # steps, after which the peak of memory grows by one per cent at most
PARTS = {SwinBranch: "backbones", PixelDecoder: "pixel decoder", QueryDecoder: "query decoder"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=CONFIG.batch)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both", help="of our training step")
    parser.add_argument("--recompute", action="store_true", help="our side recomputes activations: less memory")
    parser.add_argument("--head-passes", choices=HEAD_PASSES, default="auto", help="of our side")
    parser.add_argument("--part", choices=("step", "evaluation", "both"), default="both")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--peak-of", metavar="SIDE", help=argparse.SUPPRESS)  # what a process for one side is told
    given = parser.parse_args()
    Machine(runs=Path(), threads=given.threads).take_process()
    if given.peak_of:
        sides, images = (evaluation_sides(), 1) if given.part == "evaluation" else (Steps(given).sides, given.batch)
        for _ in range(REMEMBERED):
            sides[given.peak_of](Clock(), images)
        print(peak())
        return
    before = os.getloadavg()[0]
    given.until = time.monotonic() + 60 * given.minutes
    found: dict[str, dict[str, Any]] = {}
    if given.part in ("evaluation", "both"):  # the shorter one first
        found |= evaluation(given)
    if given.part in ("step", "both"):
        found |= step(given)
    about = {
        "cpu": cpu(), "cores": cores(), "threads": given.threads, "precision": given.precision,
        "recompute": given.recompute, "head_passes": given.head_passes, "batch": given.batch,
        "load": [round(load, 1) for load in (before, os.getloadavg()[0])],
        "date": datetime.now(UTC).date().isoformat(), "versions": {name: _version(name) for name in PACKAGES},
    }  # fmt: skip
    print(table(about, found))
    if given.json:
        given.json.write_text(json.dumps({**about, **found}, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------- both sides


class Clock:
    """Wall and processor seconds of the parts of one turn."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.wall[name] += time.perf_counter() - wall
        self.cpu[name] += time.process_time() - processor


class Steps:
    """A training step of all sides on the same network."""

    def __init__(self, given: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.given = given
        precisions = ("fp32", "bf16") if given.precision == "both" else (given.precision,)
        config = override(CONFIG, {"batch": given.batch})
        split = open_run_split(config.data, "train", None, None)
        self.batch = make_batch(config, split, 0)
        self.model = build_segmenter(CONFIG.model, split.spec.num_classes).train()
        size = (self.batch.image.shape[2], self.batch.image.shape[3])
        machine = Machine(runs=Path(), threads=given.threads, head_passes=given.head_passes, recompute=given.recompute)
        tokens = size[0] * size[1] // PATCH**2
        self.head_passes = machine.passes_through_head(given.batch, tokens, config.model.width)
        hidden = training_masks(config, size, 0)
        assert hidden is not None
        self.hidden = hidden
        self.targets = make_targets(
            self.batch.label, split.spec.num_classes, split.spec.ignore_index, valid=self.batch.valid
        )
        self.our_optimizer = build_optimizer(self.model, CONFIG.optim)
        self.their_optimizer = released.optimizer(self.model, CONFIG.optim)
        self.their_optimizer.state = self.our_optimizer.state  # the same tensors in other groups
        self.sides: dict[str, Side] = {precision: partial(self._ours, precision) for precision in precisions}
        self.sides["released"] = self._theirs

    @torch.no_grad()
    def apart(self) -> dict[str, float]:
        """How far losses of one image at equal points are from the released ones, by precision."""
        draw = torch.Generator().manual_seed(0)
        theirs = released.losses(self.model, *self._given(1), CONFIG.loss, draw, lambda name: nullcontext())
        found = {}
        for precision in self.sides.keys() - {"released"}:
            with in_precision(self.model, precision):
                points = ReleasedPoints(torch.Generator().manual_seed(0))
                ours = objective(self.model, *self._given(1), CONFIG.loss, points, self.head_passes).terms
            found[precision] = max(abs(ours[name].item() / value.item() - 1) for name, value in theirs.items())
        return found

    def _given(self, images: int) -> tuple[Tensor, Tensor, Targets]:
        return self.batch.image[:images], self.hidden[:images], self.targets.part(slice(0, images))

    def _ours(self, precision: str, clock: Clock, images: int) -> None:
        self.model.recompute(self.given.recompute)
        with parted(self.model, clock), clock.part("whole"), in_precision(self.model, precision):
            points = RandomPoints(torch.Generator().manual_seed(0))
            objective(self.model, *self._given(images), CONFIG.loss, points, self.head_passes, backward=True)
        named = ("backbones", "pixel decoder", "query decoder")
        for times in (clock.wall, clock.cpu):
            backward = times.pop("backward")  # to stand last, as on the other side
            times["matching and losses"] = times.pop("whole") - backward - sum(times[name] for name in named)
            times["backward"] = backward
        descend(self.model, self.our_optimizer, clock)
        self.model.recompute(False)

    def _theirs(self, clock: Clock, images: int) -> None:
        draw = torch.Generator().manual_seed(0)
        terms = released.losses(self.model, *self._given(images), CONFIG.loss, draw, clock.part)
        with clock.part("backward"):
            torch.stack(list(terms.values())).sum().backward()
        descend(self.model, self.their_optimizer, clock)


def step(given: argparse.Namespace) -> dict[str, Any]:
    """A training step of all sides, and how far losses of one image at equal points are apart."""
    steps = Steps(given)
    say("comparing losses")
    apart = steps.apart()
    found = in_turns("step", steps.sides, given, given.batch)
    names = {"fp32": "step", "bf16": "step_bf16"}
    return {names[one]: {"losses_apart": apart[one]} | result for one, result in found.items()}


@contextmanager
def in_precision(model: Segmenter, precision: str) -> Iterator[None]:
    """As `crm.step` computes in this precision."""
    model.half_precision(precision == "bf16")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        yield
    model.half_precision(False)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    with clock.part("optimiser"):
        nn.utils.clip_grad_norm_(model.parameters(), CONFIG.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def evaluation_sides(found: dict[str, Tensor] | None = None) -> dict[str, Side]:
    """One image of 480 x 640 to its class map, which goes into `found`."""
    torch.manual_seed(0)
    model = build_segmenter(CONFIG.model, 9).eval().requires_grad_(False)  # the counter of operations needs it
    image = torch.randn(1, 4, 480, 640)
    found = {} if found is None else found

    def ours(clock: Clock, images: int) -> None:
        with clock.part("all"), torch.inference_mode():
            found["ours"] = semantic_scores(model(image), (480, 640)).argmax(1)

    def theirs(clock: Clock, images: int) -> None:
        with clock.part("all"):
            found["released"] = released.predict(model, image)

    return {"ours": ours, "released": theirs}


def evaluation(given: argparse.Namespace) -> dict[str, Any]:
    """One image of both sides, and how many pixels have another class."""
    maps: dict[str, Tensor] = {}
    result = in_turns("evaluation", evaluation_sides(maps), given, 1)["ours"]
    changed = float((maps["ours"] != maps["released"]).double().mean())
    return {"evaluation": {"pixels_changed": changed} | result}


@contextmanager
def parted(model: Segmenter, clock: Clock) -> Iterator[None]:
    """Inside, the forward passes of the network's parts are timed, and all backward passes, in the calling thread.

    Others do the same beside it, each for images of its own.
    """
    began: list[tuple[float, float]] = []
    here = threading.current_thread()

    def before(module: nn.Module, args: Any) -> None:
        if threading.current_thread() is here:
            began.append((time.perf_counter(), time.process_time()))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if threading.current_thread() is here:
            wall, processor = began.pop()
            name = PARTS[type(module)]  # pyright: ignore[reportArgumentType]
            clock.wall[name] += time.perf_counter() - wall
            clock.cpu[name] += time.process_time() - processor

    parts = [part for part in model.modules() if type(part) in PARTS]
    hooks = [hook for part in parts for hook in (part.register_forward_pre_hook(before),
                                                 part.register_forward_hook(after))]  # fmt: skip
    plain = torch.autograd.backward

    def timed(*args: Any, **options: Any) -> None:
        with clock.part("backward") if threading.current_thread() is here else nullcontext():
            plain(*args, **options)

    torch.autograd.backward = timed
    try:
        yield
    finally:
        torch.autograd.backward = plain
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------------------------------------- measuring


def in_turns(part: str, sides: dict[str, Side], given: argparse.Namespace, batch: int) -> dict[str, dict[str, Any]]:
    """For every side but "released", its medians and those of "released", and the ratios turn by turn.

    The first turn of each, on one image, warms up and counts operations, which a batch has in proportion.
    """
    peaks = {}
    for name in sides:
        say(f"memory: {name}")
        peaks[name] = peak_of(part, name, given)
    operations = {}
    for name, side in sides.items():
        say(f"warming up: {name}")
        with FlopCounterMode(display=False) as counter:
            side(Clock(), 1)
        operations[name] = batch * counter.get_total_flops()
    turns: dict[str, list[Clock]] = {name: [] for name in sides}
    first: dict[str, list[Clock]] = {name: [] for name in sides}
    for name, side in [*sides.items()] * SETTLING:
        say(f"first steps: {name}")
        first[name].append(clock := Clock())
        side(clock, batch)
    products: list[float] = []
    for number in range(given.rounds):
        say(f"round {number + 1} of {given.rounds}")
        began = time.monotonic()
        products.append(product_speed(torch.float32))
        for name, side in sides.items():
            turns[name].append(clock := Clock())
            side(clock, batch)
        now = time.monotonic()
        if now + (now - began) > given.until:
            break
    ceiling = median(products)
    measured = {name: _one_side(clocks, peaks[name], operations[name], ceiling) for name, clocks in turns.items()}
    found = {}
    for name in sides:
        if name != "released":
            found[name] = {
                "rounds": len(turns[name]), "ceiling_gflops": round(ceiling / 1e9, 1),
                "ours": measured[name], "released": measured["released"],
                **{f"ratio_{kind}": _ratio(turns, name, kind) for kind in ("wall", "cpu")},
                **{f"first_{kind}": _ratio(first, name, kind) for kind in ("wall", "cpu")},
                "ratio_memory": round(peaks[name] / peaks["released"], 3),
            }  # fmt: skip
    return found


def _ratio(turns: dict[str, list[Clock]], name: str, kind: str) -> float:
    """Median over the rounds of a side's time to that of the released arrangement."""
    pairs = zip(turns[name], turns["released"], strict=True)
    return round(median(sum(getattr(a, kind).values()) / sum(getattr(b, kind).values()) for a, b in pairs), 3)


def _one_side(clocks: list[Clock], peak: int, operations: int, ceiling: float) -> dict[str, Any]:
    wall, processor = (
        {part: round(median(times[part] for times in kind), 3) for part in kind[0]}
        for kind in ([clock.wall for clock in clocks], [clock.cpu for clock in clocks])
    )
    seconds = median(sum(clock.wall.values()) for clock in clocks)
    return {
        "wall_seconds": round(seconds, 3),
        "cpu_seconds": round(median(sum(clock.cpu.values()) for clock in clocks), 3),
        "parts_wall": wall,
        "parts_cpu": processor,
        "peak_bytes": peak,
        "operations": operations,
        "gflops": round(operations / seconds / 1e9, 1),
        "of_ceiling": round(operations / seconds / ceiling, 3),
    }


def product_speed(kind: torch.dtype) -> float:
    """Operations per second of a matrix product, the best of five."""
    side = 2048
    a, b = torch.randn(side, side, dtype=kind), torch.randn(side, side, dtype=kind)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def peak_of(part: str, side: str, given: argparse.Namespace) -> int:
    """Peak of resident memory, in bytes, of a process of its own that takes some turns of one side."""
    told = ["--part", part, "--peak-of", side, "--batch", given.batch, "--threads", given.threads,
            "--head-passes", given.head_passes, *(["--recompute"] if given.recompute else [])]  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.step", *map(str, told)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak() -> int:
    """Peak of resident memory of this process, bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def table(about: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    loads = " to ".join(map(str, about["load"]))
    how = f"{about['head_passes']}{', recomputing' if about['recompute'] else ''}"
    lines = [
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, load {loads}; "
        f"batch {about['batch']}, ours {how}"
    ]
    for name, result in found.items():
        same = (f"losses apart by {result['losses_apart']:.1e}" if "losses_apart" in result
                else f"pixels that change class {result['pixels_changed']:.1e}")  # fmt: skip
        lines += ["", f"{name}: {same}; rounds {result['rounds']}; ceiling {result['ceiling_gflops']:.0f} GFLOP/s",
                  f"{'':22}{'released s (cpu s)':>20}{'ours s (cpu s)':>20}{'ratio':>8}{'of cpu':>8}"]  # fmt: skip
        one, two = result["released"], result["ours"]
        for part in one["parts_wall"]:
            a, b, c, d = (side[kind].get(part, 0.0) for kind in ("parts_wall", "parts_cpu") for side in (one, two))
            lines.append(f"  {part:20}{a:11.2f} ({c:6.2f}){b:11.2f} ({d:6.2f}){b / a:8.2f}{d / c:8.2f}")
        lines += [
            f"  {'whole':20}{one['wall_seconds']:11.2f} ({one['cpu_seconds']:6.2f}){two['wall_seconds']:11.2f} "
            f"({two['cpu_seconds']:6.2f}){result['ratio_wall']:8.2f}{result['ratio_cpu']:8.2f}",
            f"  {'first steps':60}{result['first_wall']:8.2f}{result['first_cpu']:8.2f}",
            f"  {'peak memory, GB':20}{one['peak_bytes'] / 1e9:20.2f}{two['peak_bytes'] / 1e9:20.2f}"
            f"{result['ratio_memory']:8.2f}",
            f"  {'GFLOP':20}{one['operations'] / 1e9:20.0f}{two['operations'] / 1e9:20.0f}",
            f"  {'GFLOP/s (of ceiling)':20}{one['gflops']:13.0f} ({one['of_ceiling']:.2f})"
            f"{two['gflops']:13.0f} ({two['of_ceiling']:.2f})",
        ]  # fmt: skip
    return "\n".join(lines)


def _version(name: str) -> str:
    return version(name)


def say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
