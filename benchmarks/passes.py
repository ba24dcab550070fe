"""What drawing one single modality per step saves: the head passes of RGB and thermal alone, of one in place of both.

    python -m benchmarks.passes [--rounds 3] [--batch 2] [--threads 1] [--json [FILE]]

A whole training step of the published Swin-T network with random weights, as in `benchmarks.step`, once with
`loss.passes=all` and once with `one_single_modality`, in one process in turns and at equal steps; the median counts.
Processor seconds stand beside wall seconds: where others use the machine, those are the ones to compare. What it costs
in mIoU is measured by the sweep `ablation_passes`.
"""

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.report import machine, machine_words, parser, say, show
from benchmarks.step import CONFIG
from crm.config import override
from crm.data.dataset import open_run_split
from crm.data.loader import make_batch
from crm.machine import Machine
from crm.passes import PASSES
from crm.step import Trainer


def main() -> None:
    options = parser("passes", __doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--batch", type=int, default=CONFIG.batch)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--small", action="store_true", help="a small network in its place, to see that it works")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    about = {**machine(), "rounds": given.rounds, "batch": given.batch, "threads": given.threads, "small": given.small}
    found = measure(given.rounds, given.batch, given.small)
    show(given, {**about, **found}, table(about, found))


def measure(rounds: int, batch: int, small: bool) -> dict[str, Any]:
    """Seconds of a step of both, and their ratios turn by turn."""
    config = override(CONFIG, {"batch": batch, **(SMALL if small else {})})
    configs = {passes: override(config, {"loss.passes": passes}) for passes in PASSES}
    split = open_run_split(config.data, "train", None)
    trainer = Trainer(config, Machine(runs=Path()), split.spec, 1)
    trainer.begin()
    images = make_batch(config, split, 0)
    turns: dict[str, list[tuple[float, float]]] = {passes: [] for passes in PASSES}
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}" if number else "warming up")
        for passes in PASSES:
            trainer.config = configs[passes]  # read in every step: one network takes the steps of both
            wall, processor = time.perf_counter(), time.process_time()
            trainer.step(images, number)
            if number:
                turns[passes].append((time.perf_counter() - wall, time.process_time() - processor))
    found: dict[str, Any] = {}
    for passes, each in turns.items():
        wall, processor = (median(turn[i] for turn in each) for i in (0, 1))
        found[passes] = {"wall_seconds": round(wall, 3), "cpu_seconds": round(processor, 3)}
    for i, kind in enumerate(("wall", "cpu")):
        pairs = zip(turns["one_single_modality"], turns["all"], strict=True)
        found[f"saved_{kind}"] = round(1 - median(one[i] / two[i] for one, two in pairs), 3)
    return found


SMALL = {"model.embed": 16, "model.heads": (1, 2, 4, 8), "model.depths": (1, 1, 1, 1), "model.width": 32,
         "model.encoder_layers": 1, "model.decoder_layers": 2, "loss.points": 256}  # fmt: skip


def table(about: dict[str, Any], found: dict[str, Any]) -> str:
    lines = [f"{machine_words(about)}; batch {about['batch']}, {about['threads']} threads"]
    lines += [f"{passes:22}{found[passes]['wall_seconds']:8.2f} s{found[passes]['cpu_seconds']:8.2f} cpu s"
              for passes in PASSES]  # fmt: skip
    return "\n".join([*lines, f"saved: {found['saved_wall']:.0%} of wall time, {found['saved_cpu']:.0%} of cpu"])


if __name__ == "__main__":
    main()
