"""Images per second that the loader prepares, by worker processes and by where decoded frames are kept.

    python -m benchmarks.loader [--recipe released] [--json [FILE]]

Synthetic frames of 480x640 are written in the MF layout first. Then each combination prepares training batches of the
published MF setting (crop 240x320, random resize, flip, jitter) that nobody consumes: "released" is arranged as in the
released code (`benchmarks.released_loader`), "uncached" decodes every image from its PNG, "ram" and "file" have decoded
all before. All in one run on one machine, so that ratios can be compared. Processor seconds of an image are without
worker processes: where others use the machine, those are the ones to compare.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.released_loader import released_batches
from benchmarks.report import machine, machine_words, parser, say, show
from crm.config import Config, Data
from crm.data.dataset import Split, open_split
from crm.data.export import write_synthetic
from crm.data.loader import batches

KINDS = ("released", "uncached", "ram", "file")
RECIPES = {
    "clean": Data(),
    "released": replace(Data(), float_resize=True, float_jitter=True, drop_last=True),
}


def main() -> None:
    options = parser("loader", __doc__)
    options.add_argument("--frames", type=int, default=96, help="images written and prepared per combination")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--workers", default="0,1,2,4", help="numbers of worker processes")
    options.add_argument("--recipe", choices=RECIPES, default="clean")
    given = options.parse_args()
    torch.set_num_threads(1)  # as in the workers, so that numbers are per process
    counts = sorted({0, *(int(number) for number in given.workers.split(","))})
    with tempfile.TemporaryDirectory() as scratch:
        say(f"writing {given.frames} frames of 480x640")
        write_synthetic("mf", Path(scratch) / "mfnet", counts={"train": given.frames}, tell=told)
        config = Config(data=RECIPES[given.recipe], batch=given.batch, steps=given.frames // given.batch)
        speeds = {kind: {} for kind in KINDS}
        seconds = {}
        for kind in KINDS:
            for workers in counts:
                say(f"{kind}, {workers} workers")
                speed, spent = images_per_second(config, kind, Path(scratch), workers)
                speeds[kind][workers] = speed
                if not workers:
                    seconds[kind] = spent
    about = {**machine(), "recipe": given.recipe, "batch": given.batch, "frames": given.frames}
    ratios = {kind: round(seconds["released"] / spent, 2) for kind, spent in seconds.items()}
    found = {"images_per_second": speeds, "cpu_seconds": seconds, "released_to_ours_cpu": ratios}
    show(given, {**about, **found}, "\n".join([table(about, speeds), "", cpu_words(seconds, ratios)]))


def prepared(kind: str, scratch: Path) -> Split:
    """The training split with nothing decoded, or everything, in memory or in a file."""
    split = open_split("mf", "train", data_root=scratch)
    if kind == "file":
        split.cache = scratch / "cache"
    if kind != "uncached":
        split.verify()
    return split


def images_per_second(config: Config, kind: str, scratch: Path, workers: int) -> tuple[float, float]:
    """Over one epoch, from the first batch on: starting workers is not part of it. And CPU seconds here, an image."""
    if kind == "released":
        made = released_batches(config, scratch / "mfnet", workers)
    else:
        made = batches(config, prepared(kind, scratch), 0, workers)
    next(made)
    began, spent = time.perf_counter(), time.process_time()
    count = sum(len(batch) if isinstance(batch, list) else len(batch.valid) for batch in made)
    return round(count / (time.perf_counter() - began), 1), round((time.process_time() - spent) / count, 5)


def cpu_words(seconds: dict[str, float], ratios: dict[str, float]) -> str:
    each = [f"{kind} {1000 * spent:.1f} ms ({ratios[kind]:.2f}x)" for kind, spent in seconds.items()]
    return f"processor time of an image: {', '.join(each)}"


def table(about: dict[str, object], speeds: dict[str, dict[int, float]]) -> str:
    """Images per second, and in brackets relative to the released arrangement with as many processes."""
    base = speeds["released"]
    lines = [f"{machine_words(about)}; {about['recipe']} recipe, batches of {about['batch']}", ""]
    lines.append("images/s  " + "".join(f"{f'{count} workers':>16}" for count in base))
    for kind, by_count in speeds.items():
        cells = [f"{speed:.0f} ({speed / base[count]:.1f}x)" for count, speed in by_count.items()]
        lines.append(f"{kind:10}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def told(split: str, done: int, count: int) -> None:
    if done % 24 == 0:
        say(f"  {done} of {count}")


if __name__ == "__main__":
    main()
