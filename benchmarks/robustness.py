"""What a robustness suite costs: a grid of conditions computed with shared branches against one forward pass each.

    python -m benchmarks.robustness [--size 240x320] [--grid 6] [--images 1] [--model tiny|demo] [--json [FILE]]

A network with random weights (Swin-T in both branches by default) evaluates synthetic scenes under RGB x thermal
conditions: "shared" as `crm evaluate` does, all conditions at once; "naive" condition by condition, each a full forward
pass with its own corruption of both images, as the released code would. If a branch pass costs b per image (both
branches together) and everything after it h, R x T conditions cost R T (b + h) naively and R b_rgb + T b_thermal +
R T h shared, so the ratio is at most their quotient, and at most (b + h) / h for ever larger grids.

All of it is measured in one process and in turns: after every head pass the shared evaluation pauses, its clock stops,
and one condition is computed naively and the parts are timed once. So whatever else the machine does slows all of them
alike. On a CPU all times are processor seconds of this process; they do not credit that images are corrupted while the
network works.
"""

import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.report import machine, machine_words, parser, say, show
from crm.conditions import CLEAN, Condition, Degradation
from crm.config import Model
from crm.confusion import Evaluation
from crm.data.dataset import Split, open_split
from crm.data.specs import SYNTHETIC
from crm.evaluate import AT_ONCE, Scored, answer, at_once, evaluate, image_scores, modality_input
from crm.machine import Machine
from crm.model.segmenter import Segmenter, build_segmenter
from experiments.synthetic_small import config as demo

T = TypeVar("T")
Found = dict[Condition, Evaluation]

MODELS = {"tiny": Model(init="none"), "demo": demo.model}


def main() -> None:
    options = parser("robustness", __doc__)
    options.add_argument("--model", choices=MODELS, default="tiny", help="tiny is Swin-T with the published head")
    options.add_argument("--size", default="240x320", help="height x width of the frames")
    options.add_argument("--grid", type=int, default=6, help="conditions of each modality, clean among them")
    options.add_argument("--images", type=int, default=1)
    options.add_argument("--rounds", type=int, default=1, help="times everything is measured; the median counts")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    if given.device != "cpu":
        Machine(runs=Path(), device=given.device, threads=given.threads).take_process()
    height, width = map(int, given.size.split("x"))
    torch.manual_seed(0)
    model = build_segmenter(MODELS[given.model], SYNTHETIC.num_classes).to(given.device).eval()
    split = open_split("synthetic", "test", size=(height, width), limit=given.images)
    split[:]  # drawn before anything is measured
    about = {
        **machine(), "threads": given.threads, "device": given.device, "model": given.model,
        "size": given.size, "grid": f"{given.grid} x {given.grid}", "images": given.images,
    }  # fmt: skip
    measured = measure(model, split, grid(given.grid), given.device, given.rounds)
    show(given, {**about, **measured}, table(about, measured))


def grid(side: int) -> list[Condition]:
    """Clean and noise of growing strength, RGB x thermal."""
    noise = [CLEAN, *(Degradation(kind="gaussian_noise", severity=10.0 * level) for level in range(1, side))]
    return [Condition(rgb=rgb, thermal=thermal) for rgb, thermal in product(noise, noise)]


def measure(model: Segmenter, split: Split, conditions: list[Condition], device: str, rounds: int) -> dict[str, float]:
    """Seconds per image of both ways and of their parts, the ratio, what it can be at most, and how results differ."""
    rgb, thermal = ({getattr(condition, side) for condition in conditions} for side in ("rgb", "thermal"))
    say("warming up")
    parts(model, split, device)
    turns = []
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        seconds, shared, naive = in_turns(model, split, conditions, device)
        turns.append({name: value / len(split) for name, value in seconds.items()})
    seconds = {name: float(np.median([turn[name] for turn in turns])) for name in turns[0]}
    b, h, count = seconds["rgb"] + seconds["thermal"], seconds["head"], len(conditions)
    bound = count * (b + h) / (len(rgb) * seconds["rgb"] + len(thermal) * seconds["thermal"] + count * h)
    ratio = float(np.median([turn["naive"] / turn["shared"] for turn in turns]))
    changed = sum(np.abs(shared[one].confusion - naive[one].confusion).sum() // 2 for one in conditions)
    return {
        **{f"seconds_{name}": round(value, 4) for name, value in seconds.items()},
        "conditions": count,
        "ratio": round(ratio, 3),
        "bound": round(bound, 3),
        "share_of_bound": round(ratio / bound, 3),
        "bound_of_any_grid": round((b + h) / h, 3),
        "image_conditions_per_second": round(count / seconds["shared"], 2),
        "image_conditions_per_second_naive": round(count / seconds["naive"], 2),
        "pixels_changed": float(changed / sum(found.confusion.sum() for found in naive.values())),
    }


def in_turns(
    model: Segmenter, split: Split, conditions: list[Condition], device: str
) -> tuple[dict[str, float], Found, Found]:
    """Seconds of one pass in turns, for all images: shared, naive, and the means of the parts; and what both found."""
    batch = at_once(AT_ONCE, split.size, device)
    seconds = dict.fromkeys(("shared", "naive", "rgb", "thermal", "head"), 0.0)
    naive: Found = {}
    began = 0.0

    def pause(scored: Scored) -> None:
        nonlocal began
        seconds["shared"] += clock(device) - began
        if len(naive) < len(conditions):
            one = conditions[len(naive)]
            took, found = timed(lambda: dict(evaluate(model, split, [one], batch, device)), device)
            naive.update(found)
            seconds["naive"] += took
            for name, value in parts(model, split, device).items():
                seconds[name] += value / len(conditions)
        began = clock(device)

    began = clock(device)
    shared = dict(evaluate(model, split, conditions, batch, device, tell=pause))
    seconds["shared"] += clock(device) - began
    return seconds, shared, naive


@torch.no_grad()
def parts(model: Segmenter, split: Split, device: str) -> dict[str, float]:
    """Seconds for all images of each branch, and of everything after them: fusion, head, scores, classes."""
    noise = Degradation(kind="gaussian_noise", severity=10.0)
    batch = at_once(AT_ONCE, split.size, device)
    seconds = dict.fromkeys(("rgb", "thermal", "head"), 0.0)
    for first in range(0, len(split), batch):
        frames = split[first : first + batch]
        maps = {}
        for side in ("rgb", "thermal"):
            image = modality_input(split.spec, frames, side, noise, 0)[0].to(device)
            took, maps[side] = timed(lambda side=side, image=image: model.branch(side, image), device)
            seconds[side] += took
        padded = (image.shape[2], image.shape[3])

        def after(frames=frames, maps=maps, padded=padded) -> None:
            prediction = model.head(model.fuse(maps["rgb"], maps["thermal"]), deep=False)
            for i, frame in enumerate(frames):
                answer(image_scores(prediction, i, padded, frame.size, frame.size))

        seconds["head"] += timed(after, device)[0]
    return seconds


def timed(work: Callable[[], T], device: str) -> tuple[float, T]:
    """Seconds it took, and what it returned."""
    began = clock(device)
    made = work()
    return clock(device) - began, made


def clock(device: str) -> float:
    """Seconds: of this process's work on a CPU, of everybody's time where a GPU works."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def table(about: dict[str, Any], found: dict[str, float]) -> str:
    s = {name: found[f"seconds_{name}"] for name in ("rgb", "thermal", "head", "shared", "naive")}
    return "\n".join([
        f"{machine_words(about)}; {about['model']} on {about['device']}, "
        f"{about['size']}, {about['images']} images, {about['threads']} threads",
        f"seconds per image: RGB branch {s['rgb']:.3f}, thermal branch {s['thermal']:.3f}, "
        f"fusion to classes {s['head']:.3f}",
        f"{about['grid']} grid: {s['naive']:.2f} s per image one by one, {s['shared']:.2f} s shared",
        f"ratio {found['ratio']:.2f}: {found['share_of_bound']:.0%} of the most that these times allow for this grid, "
        f"{found['bound']:.2f}; for any grid {found['bound_of_any_grid']:.2f}",
        f"images x conditions per second: {found['image_conditions_per_second_naive']:.1f} -> "
        f"{found['image_conditions_per_second']:.1f}",
        f"pixels that change class: {found['pixels_changed']:.1e}",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
