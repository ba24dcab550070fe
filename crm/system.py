"""What a training process takes of its machine, measured by itself and seldom."""

import time
from typing import Any

import psutil
import torch

EVERY = 15.0  # seconds between two measurements at least; one costs milliseconds


class Load:
    """CPU and memory of this process and those it has started, and of its GPU: not of the machine, which has others."""

    def __init__(self, device: str) -> None:
        self.device, self.process = device, psutil.Process()
        self.at, self.spent = time.monotonic(), self._processor_seconds()

    def due(self) -> dict[str, Any] | None:
        """CPUs in use since the last time, and memory in GiB; None if that was not long ago."""
        passed = time.monotonic() - self.at
        if passed < EVERY:
            return None
        spent = self._processor_seconds()
        measured = {"cpus": round((spent - self.spent) / passed, 2), "memory_gib": round(self._memory() / 2**30, 3)}
        self.at, self.spent = time.monotonic(), spent
        return measured | self._gpu()

    def _family(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def _processor_seconds(self) -> float:
        total = 0.0
        for each in self._family():
            try:
                times = each.cpu_times()
            except psutil.Error:  # it has ended meanwhile
                continue
            total += times.user + times.system
        return total

    def _memory(self) -> int:
        total = 0
        for each in self._family():
            try:
                total += each.memory_info().rss
            except psutil.Error:
                continue
        return total

    def _gpu(self) -> dict[str, Any]:
        """Memory of the GPU that PyTorch has set aside, now and at most."""
        if not self.device.startswith("cuda"):
            return {}
        return {
            "gpu_memory_gib": round(torch.cuda.memory_reserved(self.device) / 2**30, 3),
            "gpu_memory_peak_gib": round(torch.cuda.max_memory_reserved(self.device) / 2**30, 3),
        }
