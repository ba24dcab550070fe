"""What a training step and an evaluation cost, ours beside an as-released arrangement of the same network.

    python -m benchmarks.step [--rounds 4] [--minutes 12] [--batch 2] [--precision fp32|bf16|both] [--recompute]
                              [--part step|evaluation|both] [--threads N] [--device cpu|cuda] [--compile] [--json FILE]

The published Swin-T network with random weights on synthetic scenes: batch 2, 256 x 320 pixels, complementary masks 0.5
of patch 32, 12,544 points; evaluation of one image of 480 x 640. Stochastic depth is off, so that losses can be
compared. `benchmarks.released` is the other side, always in float32. All sides run in one process in turns, with the
same state of the optimiser; the median counts. Processor seconds stand beside wall seconds: where others use the
machine, those are the ones to compare. The memory that a process asks for at first it keeps, and asking takes the
released arrangement, which has the larger blocks, seconds over several steps: so the first rounds are counted by
themselves; then both sides have settled. No round begins that would end after --minutes, except the first.
Memory is the peak of resident memory of a process that takes three such steps of one side and does nothing else.
The ceiling is what one large matrix product of float32 achieves at the same moment.

`--compile` adds a side whose branches and head are compiled. On a GPU every part ends when the GPU has done it, memory
is the GPU's, and both ways of deformable sampling are timed by themselves.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import warnings
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
from crm.model.sampling import seconds_of_both
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
NAMES = {"fp32": "step", "bf16": "step_bf16", "fp32 compiled": "step_compiled", "bf16 compiled": "step_bf16_compiled"}
SIDES = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is the ceiling
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
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--compile", action="store_true", help="our side also with compiled parts")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--peak-of", metavar="SIDE", help=argparse.SUPPRESS)  # what a process for one side is told
    given = parser.parse_args()
    Machine(runs=Path(), device=given.device, threads=given.threads).take_process()
    if given.peak_of:
        evaluates = given.part == "evaluation"
        sides, images = (evaluation_sides(given.device), 1) if evaluates else (Steps(given).sides, given.batch)
        for _ in range(REMEMBERED):
            sides[given.peak_of](Clock(given.device), images)
        print(peak(given.device))
        return
    before = os.getloadavg()[0]
    given.until = time.monotonic() + 60 * given.minutes
    found: dict[str, dict[str, Any]] = {}
    if given.part in ("evaluation", "both"):  # the shorter one first
        found |= evaluation(given)
    if given.part in ("step", "both"):
        found |= step(given)
    if given.device != "cpu":
        found |= {"sampling": sampling(given.device)}
    about = {
        "cpu": cpu(), "cores": cores(), "threads": given.threads, "precision": given.precision,
        "recompute": given.recompute, "head_passes": given.head_passes, "batch": given.batch, "device": given.device,
        **({} if given.device == "cpu" else {"gpu": torch.cuda.get_device_name(given.device)}),
        "load": [round(load, 1) for load in (before, os.getloadavg()[0])],
        "date": datetime.now(UTC).date().isoformat(), "versions": {name: _version(name) for name in PACKAGES},
    }  # fmt: skip
    print(table(about, found))
    if given.json:
        given.json.write_text(json.dumps({**about, **found}, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------- both sides


class Clock:
    """Wall and processor seconds of the parts of one turn."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)

    def now(self) -> tuple[float, float]:
        """Wall and processor seconds when all that was asked for is done."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self.now()
        yield
        self.add(name, began)

    def add(self, name: str, began: tuple[float, float]) -> None:
        wall, processor = self.now()
        self.wall[name] += wall - began[0]
        self.cpu[name] += processor - began[1]


class Steps:
    """A training step of all sides on the same network."""

    def __init__(self, given: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.given = given
        device = given.device
        precisions = ("fp32", "bf16") if given.precision == "both" else (given.precision,)
        config = override(CONFIG, {"batch": given.batch})
        split = open_run_split(config.data, "train", None, None)
        batch = make_batch(config, split, 0)
        self.image = batch.image.to(device)
        self.model = build_segmenter(CONFIG.model, split.spec.num_classes).to(device).train()
        size = (batch.image.shape[2], batch.image.shape[3])
        tokens = size[0] * size[1] // PATCH**2
        self.head_passes = {}  # by whether parts are compiled
        for compiled in {False, given.compile}:
            machine = Machine(runs=Path(), device=device, threads=given.threads, head_passes=given.head_passes,
                              recompute=given.recompute, compile=compiled)  # fmt: skip
            self.head_passes[compiled] = machine.passes_through_head(given.batch, tokens, config.model.width)
        hidden = training_masks(config, size, 0)
        assert hidden is not None
        self.hidden = hidden.to(device)
        spec = split.spec
        self.targets = make_targets(batch.label, spec.num_classes, spec.ignore_index, valid=batch.valid).to(device)
        self.compiled = {
            part: torch.compile(part._call_impl, dynamic=False)
            for part in self.model.modules() if given.compile and type(part) in PARTS
        }  # fmt: skip
        self.our_optimizer = build_optimizer(self.model, CONFIG.optim)
        self.their_optimizer = released.optimizer(self.model, CONFIG.optim)
        if device == "cpu":  # on a GPU the fused one counts its steps there, where the other one would wait for them
            self.their_optimizer.state = self.our_optimizer.state  # the same tensors in other groups
        self.sides: dict[str, Side] = {precision: partial(self._ours, precision) for precision in precisions}
        if given.compile:
            # what Dynamo warns of, caches of constants, is right
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
            self.sides[f"{precisions[-1]} compiled"] = partial(self._compiled, precisions[-1])
        self.sides["released"] = self._theirs

    @torch.no_grad()
    def apart(self) -> dict[str, float]:
        """How far losses of one image at equal points are from the released ones, by precision."""
        theirs = released.losses(self.model, *self._given(1), CONFIG.loss, self._draw(), lambda name: nullcontext())
        found = {}
        for side in self.sides.keys() - {"released"}:
            precision, compiled = side.partition(" ")[0], side.endswith(" compiled")
            with in_precision(self.model, precision, self.given.device), self._compiling(compiled):
                points = ReleasedPoints(self._draw())
                ours = objective(self.model, *self._given(1), CONFIG.loss, points, self.head_passes[compiled]).terms
            found[side] = max(abs(ours[name].item() / value.item() - 1) for name, value in theirs.items())
        return found

    @contextmanager
    def _compiling(self, on: bool) -> Iterator[None]:
        """Inside, branches and head are compiled, if so wanted; once, as `Segmenter.compile_parts` does."""
        for part, compiled in self.compiled.items():
            part._compiled_call_impl = compiled if on else None
        yield
        for part in self.compiled:
            part._compiled_call_impl = None

    def _draw(self) -> torch.Generator:
        return torch.Generator(self.given.device).manual_seed(0)

    def _given(self, images: int) -> tuple[Tensor, Tensor, Targets]:
        return self.image[:images], self.hidden[:images], self.targets.part(slice(0, images))

    def _ours(self, precision: str, clock: Clock, images: int) -> None:
        self.model.recompute(self.given.recompute)
        device = self.given.device
        with parted(self.model, clock), clock.part("whole"), in_precision(self.model, precision, device):
            points = RandomPoints(self._draw())
            objective(self.model, *self._given(images), CONFIG.loss, points, self.head_passes[False], backward=True)
        named = ("backbones", "pixel decoder", "query decoder")
        for times in (clock.wall, clock.cpu):
            backward = times.pop("backward")  # to stand last, as on the other side
            times["matching and losses"] = times.pop("whole") - backward - sum(times[name] for name in named)
            times["backward"] = backward
        descend(self.model, self.our_optimizer, clock)
        self.model.recompute(False)

    def _compiled(self, precision: str, clock: Clock, images: int) -> None:
        """Not in parts: what looks into a compiled network makes another one of it."""
        with clock.part("whole"), in_precision(self.model, precision, self.given.device), self._compiling(True):
            points = RandomPoints(self._draw())
            objective(self.model, *self._given(images), CONFIG.loss, points, self.head_passes[True], backward=True)
        descend(self.model, self.our_optimizer, clock)

    def _theirs(self, clock: Clock, images: int) -> None:
        terms = released.losses(self.model, *self._given(images), CONFIG.loss, self._draw(), clock.part)
        with clock.part("backward"):
            torch.stack(list(terms.values())).sum().backward()
        descend(self.model, self.their_optimizer, clock)


def step(given: argparse.Namespace) -> dict[str, Any]:
    """A training step of all sides, and how far losses of one image at equal points are apart."""
    steps = Steps(given)
    say("comparing losses")
    apart = steps.apart()
    found = in_turns("step", steps.sides, given, given.batch)
    return {NAMES[one]: {"losses_apart": apart[one]} | result for one, result in found.items()}


def sampling(device: str) -> dict[str, float]:
    """Seconds of deformable sampling on maps of the published size, by the kernel and by the gather."""
    sizes = ((8, 10), (16, 20), (32, 40))
    tokens = sum(height * width for height, width in sizes)
    kernel, gather = seconds_of_both(torch.device(device), (tokens, 8, 32), 4, sizes)
    return {"kernel_seconds": kernel, "gather_seconds": gather, "ratio": round(kernel / gather, 3)}


@contextmanager
def in_precision(model: Segmenter, precision: str, device: str) -> Iterator[None]:
    """As `crm.step` computes in this precision."""
    model.half_precision(precision == "bf16")
    with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=precision == "bf16"):
        yield
    model.half_precision(False)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    with clock.part("optimiser"):
        nn.utils.clip_grad_norm_(model.parameters(), CONFIG.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def evaluation_sides(device: str, found: dict[str, Tensor] | None = None) -> dict[str, Side]:
    """One image of 480 x 640 to its class map, which goes into `found`."""
    torch.manual_seed(0)
    # the counter of operations needs parameters without gradients
    model = build_segmenter(CONFIG.model, 9).to(device).eval().requires_grad_(False)
    image = torch.randn(1, 4, 480, 640).to(device)
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
    result = in_turns("evaluation", evaluation_sides(given.device, maps), given, 1)["ours"]
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
            began.append(clock.now())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if threading.current_thread() is here:
            clock.add(PARTS[type(module)], began.pop())  # pyright: ignore[reportArgumentType]

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
        if "compiled" in name:  # which the counter does not see
            side(Clock(given.device), batch)
            operations[name] = operations[name.partition(" ")[0]]
            continue
        with FlopCounterMode(display=False) as counter:
            side(Clock(given.device), 1)
        operations[name] = batch * counter.get_total_flops()
    turns: dict[str, list[Clock]] = {name: [] for name in sides}
    first: dict[str, list[Clock]] = {name: [] for name in sides}
    for name, side in [*sides.items()] * SETTLING:
        say(f"first steps: {name}")
        first[name].append(clock := Clock(given.device))
        side(clock, batch)
    products: list[float] = []
    for number in range(given.rounds):
        say(f"round {number + 1} of {given.rounds}")
        began = time.monotonic()
        products.append(product_speed(torch.float32, given.device))
        for name, side in sides.items():
            turns[name].append(clock := Clock(given.device))
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
        {part: round(median(times[part] for times in kind), 5) for part in kind[0]}
        for kind in ([clock.wall for clock in clocks], [clock.cpu for clock in clocks])
    )
    seconds = median(sum(clock.wall.values()) for clock in clocks)
    return {
        "wall_seconds": round(seconds, 5),
        "cpu_seconds": round(median(sum(clock.cpu.values()) for clock in clocks), 5),
        "parts_wall": wall,
        "parts_cpu": processor,
        "peak_bytes": peak,
        "operations": operations,
        "gflops": round(operations / seconds / 1e9, 1),
        "of_ceiling": round(operations / seconds / ceiling, 3),
    }


def product_speed(kind: torch.dtype, device: str) -> float:
    """Operations per second of a matrix product, the best of five."""
    side = SIDES[device.partition(":")[0]]
    a, b = (torch.randn(side, side, dtype=kind, device=device) for _ in range(2))
    clock = Clock(device)
    seconds = []
    for _ in range(5):
        began, _ = clock.now()
        a @ b
        seconds.append(clock.now()[0] - began)
    return 2 * side**3 / min(seconds)


def peak_of(part: str, side: str, given: argparse.Namespace) -> int:
    """Peak of memory, in bytes, of a process of its own that takes some turns of one side."""
    told = ["--part", part, "--peak-of", side, "--batch", given.batch, "--threads", given.threads,
            "--head-passes", given.head_passes, "--device", given.device, "--precision", given.precision,
            *(f"--{name}" for name in ("recompute", "compile") if getattr(given, name))]  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.step", *map(str, told)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak(device: str) -> int:
    """Peak of this process's memory on a GPU, or of its resident memory, bytes (Linux)."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def table(about: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    loads = " to ".join(map(str, about["load"]))
    how = f"{about['head_passes']}{', recomputing' if about['recompute'] else ''}"
    lines = [
        f"{about.get('gpu', about['cpu'])}, {about['cores']} cores, {about['threads']} threads, load {loads}; "
        f"batch {about['batch']}, ours {how}"
    ]
    if "sampling" in found:
        both = found["sampling"]
        lines.append(f"deformable sampling: {both['kernel_seconds']:.5f} s, as a gather {both['gather_seconds']:.5f} s")
    digits = 2 if about["device"] == "cpu" else 4
    for name, result in found.items():
        if name == "sampling":
            continue
        same = (f"losses apart by {result['losses_apart']:.1e}" if "losses_apart" in result
                else f"pixels that change class {result['pixels_changed']:.1e}")  # fmt: skip
        lines += ["", f"{name}: {same}; rounds {result['rounds']}; ceiling {result['ceiling_gflops']:.0f} GFLOP/s",
                  f"{'':22}{'released s (cpu s)':>20}{'ours s (cpu s)':>20}{'ratio':>8}{'of cpu':>8}"]  # fmt: skip
        one, two = result["released"], result["ours"]
        for part in (part for part in one["parts_wall"] if part in two["parts_wall"]):
            a, b, c, d = (side[kind][part] for kind in ("parts_wall", "parts_cpu") for side in (one, two))
            ratios = "".join(f"{ours / theirs:8.2f}" if theirs else " " * 8 for ours, theirs in ((b, a), (d, c)))
            lines.append(f"  {part:20}{a:11.{digits}f} ({c:6.{digits}f}){b:11.{digits}f} ({d:6.{digits}f}){ratios}")
        lines += [
            f"  {'whole':20}{one['wall_seconds']:11.{digits}f} ({one['cpu_seconds']:6.{digits}f})"
            f"{two['wall_seconds']:11.{digits}f} ({two['cpu_seconds']:6.{digits}f})"
            f"{result['ratio_wall']:8.2f}{result['ratio_cpu']:8.2f}",
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
