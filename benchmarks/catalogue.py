"""The benchmarks as data: how each is started, and which of its figures stand in the table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str
    path: str  # into the benchmark's JSON, keys and positions joined by "/"
    form: str = "{:.2f}"
    target: str = ""
    on_gpu: str = ""  # the target there; one that has this alone is about GPUs alone


@dataclass(frozen=True)
class Benchmark:
    question: str
    figures: tuple[Figure, ...]
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()  # in place of these, with --quick
    by_name: bool = False  # runs only where it is asked for by name: it takes long
    gpu: tuple[str, ...] = ()  # in place of `arguments`, with --device cuda; without any it is about CPUs alone


BENCHMARKS = {
    "step": Benchmark(
        "What does a training step cost beside the released arrangement?",
        (
            Figure("training step, ours to released, wall, settled", "step/ratio_wall", target="<= 0.75",
                   on_gpu="<= 0.5"),
            Figure("training step, ours to released, wall, first steps", "step/first_wall", target="<= 0.75"),
            Figure("training step, ours to released, processor seconds", "step/ratio_cpu"),
            Figure("training step, ours to released, peak memory", "step/ratio_memory", target="<= 0.5"),
            Figure("training step, ours, seconds", "step/ours/wall_seconds"),
            Figure("training step in bf16 to released, wall, settled", "step_bf16/ratio_wall", target="<= 0.45"),
            Figure("training step in bf16 to released, wall, first steps", "step_bf16/first_wall", target="<= 0.45"),
            Figure("training step in bf16 to released, processor seconds", "step_bf16/ratio_cpu"),
            Figure("training step in bf16 to released, peak memory", "step_bf16/ratio_memory", target="<= 0.5"),
            Figure("training step in bf16, compiled, ours to released, wall", "step_bf16_compiled/ratio_wall",
                   on_gpu="<= 0.25"),
            Figure("deformable sampling, kernel to gather", "sampling/ratio", on_gpu="< 1"),
            Figure("evaluation of one image, ours to released, wall", "evaluation/ratio_wall", target="<= 0.7"),
            Figure("evaluation of one image, ours to released, processor seconds", "evaluation/ratio_cpu"),
        ),
        quick=("--rounds", "1"),
        gpu=("--rounds", "20", "--compile"),
    ),
    "passes": Benchmark(
        "What does drawing one single modality per step save?",
        (
            Figure("share of a training step, wall", "saved_wall", "{:.0%}"),
            Figure("share of a training step, processor seconds", "saved_cpu", "{:.0%}"),
        ),
        quick=("--small", "--rounds", "1"),
    ),
    "robustness": Benchmark(
        "What is sharing the branches over a grid of conditions worth?",
        (
            Figure("condition by condition to shared, processor seconds", "ratio"),
            Figure("share of the most that is possible", "share_of_bound", "{:.0%}"),
            Figure("images x conditions per second", "image_conditions_per_second"),
        ),
        quick=("--model", "demo", "--grid", "3"),
        gpu=("--rounds", "3"),
    ),
    "prediction": Benchmark(
        "How many images a second are evaluated and predicted?",
        (
            Figure("evaluation, released to ours, wall", "evaluation/released_to_ours_wall"),
            Figure("evaluation, released to ours, processor seconds", "evaluation/released_to_ours_cpu"),
            Figure("evaluation, ours, images/s", "evaluation/ours/images_per_second"),
            Figure("crm predict, released to ours, wall", "predict/released_to_ours_wall"),
            Figure("crm predict, released to ours, processor seconds", "predict/released_to_ours_cpu"),
            Figure("crm predict, ours, images/s", "predict/ours/images_per_second"),
        ),
        quick=("--model", "demo", "--rounds", "1"),
    ),
    "loader": Benchmark(
        "How fast are batches prepared?",
        (
            Figure("released arrangement to ours, processor seconds, nothing cached", "released_to_ours_cpu/uncached"),
            Figure("released arrangement to ours, processor seconds, decoded in files", "released_to_ours_cpu/file"),
            Figure("images/s, one process, as released", "images_per_second/released/0", "{:.0f}"),
            Figure("images/s, one process, nothing cached", "images_per_second/uncached/0", "{:.0f}"),
            Figure("images/s, one process, decoded in files", "images_per_second/file/0", "{:.0f}"),
            Figure("images/s, two processes, decoded in files", "images_per_second/file/2", "{:.0f}"),
        ),
        arguments=("--workers", "0,2"),
        quick=("--workers", "0,2", "--frames", "32"),
    ),
    "commands": Benchmark(
        "How long does a person wait for the command?",
        (
            Figure("crm --help, seconds", "help/wall", target="< 0.2"),
            Figure("crm plan of {cells} cells, {finished} finished, seconds", "plan/wall", target="< 3"),
            Figure("the same, processor seconds", "plan/cpu"),
            Figure("crm status of these, seconds", "status/wall", target="< 2"),
            Figure("the same, processor seconds", "status/cpu"),
            Figure("crm sweep, submitting {cells} cells, seconds", "submit/wall", "{:.0f}"),
            Figure("calls of the scheduler for one array more", "calls_per_array", "{:.0f}", "the same for any size"),
        ),
        quick=("--cells", "3000", "--finished", "500", "--rounds", "1"),
    ),
    "records": Benchmark(
        "How long does it take to look at many records?",
        (
            Figure("crm status, {runs} runs, seconds", "warm/status", target="< 2"),
            Figure("crm tables, {runs} runs, first time, seconds", "cold/tables", "{:.1f}"),
            Figure("crm tables, {runs} runs, again, seconds", "warm/tables", "{:.1f}", "< 20"),
        ),
        quick=("--runs", "1000"),
    ),
    "growth": Benchmark(
        "How do time and memory grow?",
        tuple(
            Figure(f"{what}: exponent of {kind}", f"axes/{axis}/{key}_exponent")
            for axis, what in (
                ("batch", "a step with the batch"), ("side", "a step with the image side"),
                ("conditions", "an evaluation with conditions"), ("cells", "a plan with cells"),
                ("runs", "a status with runs"),
            )
            for kind, key in (("time", "seconds"), ("memory", "bytes"))
        ),
        quick=("--points", "3", "--rounds", "1"),
    ),
    "bootstrap": Benchmark(
        "How long does a paired bootstrap take?",
        (Figure("{draws} draws, {seeds} seeds, {images} images, seconds", "seconds"),),
        quick=("--draws", "200"),
    ),
    "coverage": Benchmark(
        "How often do the intervals of a gain hold what they say?",
        (Figure("share of studies whose interval at three seeds holds the gain, lowest", "lowest/3", "{:.3f}"),),
        by_name=True,
        quick=("--studies", "100"),
    ),
    "tracking": Benchmark(
        "What does the MLflow mirror cost training?",
        (
            Figure("steps per second with the mirror to without, wall", "wall/on/mean", "{:.3f}"),
            Figure("steps per second with a server that hangs to without, wall", "wall/hang/mean", "{:.3f}"),
        ),
        quick=("--seconds", "30"),
        by_name=True,
    ),
}  # fmt: skip


def figures(benchmark: Benchmark, found: Any, on_gpu: bool = False) -> list[tuple[str, str, str]]:
    """What, value and target of every figure that a result has; a result of other options may lack some."""
    rows = []
    for figure in benchmark.figures:
        value = at(found, figure.path)
        if value is not None:
            filled = figure.what.format_map(found if isinstance(found, Mapping) else {})
            rows.append((filled, figure.form.format(value), figure.on_gpu if on_gpu else figure.target))
    return rows


def at(found: Any, path: str) -> Any:
    """The value at a path, or None where there is none."""
    for key in path.split("/"):
        if isinstance(found, list) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, Mapping):
            found = found.get(key)
        else:
            return None
    return found
