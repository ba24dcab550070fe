"""What a run costs: operations, time and memory of a training step and of inference.

Operations are counted as PyTorch's FlopCounterMode counts them: matrix products, convolutions and attention, where a
multiply-add is two. Sampling, norms and activations are not in it. Latency is that of one image, without reading it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from crm.config import SCHEMA
from crm.data.dataset import open_run_split
from crm.data.loader import make_batch
from crm.data.transforms import to_input
from crm.machine import Machine
from crm.model.segmenter import semantic_scores
from crm.records import read_config
from crm.step import Trainer

FILE = "overhead.json"  # in the run folder
WARM_UP, STEPS, IMAGES = 2, 10, 30  # first ones that do not count; then training steps, images


def measure(folder: Path, machine: Machine) -> dict[str, Any]:
    """The costs of a run's config on this machine, from a network in its initial state.

    `parameters`; `multiply_adds` of the prediction for one image; `training_operations` of one step, forward and
    backward; `step_seconds` and `latency_seconds`, medians; `training_bytes` and `inference_bytes`, peaks on the
    device, None on a CPU.
    """
    config = read_config(folder)
    split = open_run_split(config.data, "train", machine.data, machine.cache)
    trainer = Trainer(config, machine, split.spec, 1)
    trainer.begin()
    batch = make_batch(config, split, 0)
    with FlopCounterMode(display=False) as training:
        trainer.step(batch, 0)
    step_seconds, training_bytes = _timed(lambda: trainer.step(batch, 0), STEPS, machine.device)
    model = trainer.model.eval()
    image = to_input(split[0], split.spec).image.to(machine.device)

    def predict() -> None:
        semantic_scores(model(image), (image.shape[2], image.shape[3])).argmax(dim=1)

    with FlopCounterMode(display=False) as inference:
        predict()  # with gradients, without which the counter fails at a parameter that is an input of a module
    trainer.optimizer.zero_grad(set_to_none=True)  # gradients, moments and averages are no part of inference
    trainer.optimizer.state.clear()
    trainer.average = None
    with torch.inference_mode():
        latency, inference_bytes = _timed(predict, IMAGES, machine.device)
    return {
        "schema": SCHEMA,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply_adds": inference.get_total_flops() // 2,
        "training_operations": training.get_total_flops(),
        "step_seconds": step_seconds,
        "latency_seconds": latency,
        "training_bytes": training_bytes,
        "inference_bytes": inference_bytes,
        "batch": config.batch,
        "size": list(image.shape[2:]),
        "device": machine.device,
        "threads": machine.threads,
    }


def _timed(work: Callable[[], Any], times: int, device: str) -> tuple[float, int | None]:
    """Median seconds of so many calls after a warm-up, and the peak of memory on the device meanwhile."""
    cuda = device.startswith("cuda")
    seconds = []
    for number in range(WARM_UP + times):
        if cuda:
            torch.cuda.synchronize(device)
            if number == WARM_UP:
                torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return median(seconds[WARM_UP:]), torch.cuda.max_memory_allocated(device) if cuda else None
