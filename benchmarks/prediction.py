"""Images per second of evaluation and of `crm predict`, beside one image at a time as the released code's test does it.

    python -m benchmarks.prediction [--images 3] [--rounds 2] [--model tiny|demo] [--json [FILE]]

The published Swin-T network with random weights on frames of 480 x 640 in the MF layout, read from their files each
time. Evaluation: class maps and confusion matrices under the clean condition, from fresh frames. Prediction: class map
and overlay of every picture written, by the same functions on both sides. The released side reads an image, passes it
through `benchmarks.released.predict` and counts it, then the next. Both in one process in turns; medians. Processor
seconds stand beside wall seconds: where others use the machine, those are the ones to compare.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import released
from benchmarks.report import machine, machine_words, parser, say, show
from crm.conditions import Condition
from crm.config import Model
from crm.data.dataset import open_split
from crm.data.export import write_synthetic
from crm.data.specs import DATASETS
from crm.data.transforms import to_input
from crm.evaluate import AT_ONCE, at_once, evaluate
from crm.model.segmenter import Segmenter, build_segmenter
from crm.predict import Job, overlay, palette_picture, predict_files, read_frame
from experiments.synthetic_small import config as demo

SPEC = DATASETS["mf"]
MODELS = {"tiny": Model(init="none"), "demo": demo.model}


def main() -> None:
    options = parser("prediction", __doc__)
    options.add_argument("--images", type=int, default=3)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--model", choices=MODELS, default="tiny", help="tiny is Swin-T with the published head")
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    about = {**machine(), "images": given.images, "rounds": given.rounds, "model": given.model,
             "threads": given.threads}  # fmt: skip
    torch.manual_seed(0)
    model = build_segmenter(MODELS[given.model], SPEC.num_classes).eval()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_synthetic("mf", root / "mfnet", counts={"test": given.images}, tell=lambda split, done, count: None)
        found = {
            "evaluation": in_turns({"ours": lambda: our_evaluation(model, root),
                                    "released": lambda: their_evaluation(model, root)}, given.rounds, given.images),
            "predict": in_turns({"ours": lambda: our_prediction(model, root),
                                 "released": lambda: their_prediction(model, root)}, given.rounds, given.images),
        }  # fmt: skip
    show(given, {**about, **found}, table(about, found))


def our_evaluation(model: Segmenter, root: Path) -> np.ndarray:
    split = open_split("mf", "test", data_root=root)
    ((_, made),) = evaluate(model, split, [Condition(split="test")], at_once(AT_ONCE, split.size, "cpu"), "cpu")
    return made.confusion.sum(axis=0)


def their_evaluation(model: Segmenter, root: Path) -> np.ndarray:
    """One image after another, one matrix for all."""
    total = np.zeros((SPEC.num_classes, SPEC.num_classes), np.int64)
    split = open_split("mf", "test", data_root=root)
    for i in range(len(split)):
        frame = split[i]
        assert frame.label is not None
        found = released.predict(model, to_input(frame, SPEC).image)[0].numpy()
        pairs = SPEC.num_classes * frame.label.astype(np.int64) + found
        total += np.bincount(pairs.ravel(), minlength=total.size)[: total.size].reshape(total.shape)
    return total


def our_prediction(model: Segmenter, root: Path) -> None:
    out = root / "predicted"
    jobs = [Job(image=path, thermal=None, labels=out / f"{path.stem}.png", overlay=out / f"{path.stem}_overlay.png")
            for path in pictures(root)]  # fmt: skip
    predict_files(model, SPEC, jobs, out, None, "cpu", lambda done, count: None)


def their_prediction(model: Segmenter, root: Path) -> None:
    out = root / "released"
    out.mkdir(exist_ok=True)
    for path in pictures(root):
        frame = read_frame(path, None)
        classes = released.predict(model, to_input(frame, SPEC).image)[0].numpy().astype(np.uint8)
        palette_picture(classes, SPEC).save(out / f"{path.stem}.png")
        overlay(frame.rgb, classes, SPEC).save(out / f"{path.stem}_overlay.png")


def pictures(root: Path) -> list[Path]:
    return sorted((root / "mfnet" / "images").glob("*.png"))


def in_turns(sides: dict[str, Callable[[], Any]], rounds: int, images: int) -> dict[str, Any]:
    """Images per second and processor seconds of an image of both, and their ratios turn by turn."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}" if number else "warming up")
        for name, side in sides.items():
            wall, processor = time.perf_counter(), time.process_time()
            side()
            if number:
                turns[name].append(((time.perf_counter() - wall) / images, (time.process_time() - processor) / images))
    found: dict[str, Any] = {}
    for name, each in turns.items():
        wall, processor = (median(turn[i] for turn in each) for i in (0, 1))
        found[name] = {"images_per_second": round(1 / wall, 3), "cpu_seconds": round(processor, 3)}
    for i, kind in enumerate(("wall", "cpu")):
        pairs = zip(turns["released"], turns["ours"], strict=True)
        found[f"released_to_ours_{kind}"] = round(median(one[i] / two[i] for one, two in pairs), 3)
    return found


def table(about: dict[str, Any], found: dict[str, Any]) -> str:
    lines = [f"{machine_words(about)}; {about['model']}, {about['images']} images, {about['threads']} threads", "",
             f"{'':12}{'released, images/s (cpu s)':>28}{'ours':>28}{'gain':>8}{'of cpu':>8}"]  # fmt: skip
    for name, one in found.items():
        sides = [
            f"{one[side]['images_per_second']:.2f} ({one[side]['cpu_seconds']:.2f})" for side in ("released", "ours")
        ]
        gains = "".join(f"{one[f'released_to_ours_{kind}']:8.2f}" for kind in ("wall", "cpu"))
        lines.append(f"{name:12}{sides[0]:>28}{sides[1]:>28}{gains}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
