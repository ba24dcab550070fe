"""Threads of one process that each compute images of their own, with a replica of the network.

Threads that share every operation write next to each other into every tensor, and each core has to ask the other for
what it wrote. With images of its own a thread shares the weights alone.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import nn

from crm.model.segmenter import Segmenter

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What one thread computes, and with what."""

    number: int
    model: Segmenter
    images: slice  # of the batch
    draws: torch.Generator | None  # of the draws per image, the same for every share; None: the global one


class Replicas:
    """A batch in shares of equally many images."""

    def __init__(self, model: Segmenter, images: int, threaded: bool) -> None:
        """The first share has the network itself.

        Args:
            images: of the batch.
            threaded: as many shares as divide both the images and the threads of PyTorch; else one.
        """
        count = math.gcd(images, torch.get_num_threads()) if threaded else 1
        size = images // count
        drawn = [torch.default_generator.clone_state() if count > 1 else None for _ in range(count)]
        networks = [model, *(_replica(model) for _ in range(count - 1))]
        self.shares = [
            Share(i, network, slice(i * size, (i + 1) * size), draws)
            for i, (network, draws) in enumerate(zip(networks, drawn, strict=True))
        ]

    def each(self, work: Callable[[Share], T]) -> list[T]:
        """What `work` makes of each share, in order; then all gradients are those of the network itself.

        Gradients are added in the order of the shares, so that they are the same bits every time. What `work` raises is
        raised when all threads have ended.
        """
        first, *others = self.shares
        if not others:
            return [work(first)]
        threads = torch.get_num_threads()
        half = torch.is_autocast_enabled("cpu")
        kind = torch.get_autocast_dtype("cpu")  # both belong to a thread

        def alone(share: Share) -> T:
            torch.set_num_threads(threads // len(self.shares))
            with torch.autocast("cpu", kind, enabled=half):
                return work(share)

        try:
            pool = _pool(len(others))
            rest = [pool.submit(copy_context().run, alone, share) for share in others]
            try:
                found = [alone(first)]
            finally:
                wait(rest)
            found += [one.result() for one in rest]
        finally:
            torch.set_num_threads(threads)
        for share in others:
            _move_gradients(share.model, first.model)
        return found


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept for later steps: the allocator has memory for each thread, which another one does not find."""
    return ThreadPoolExecutor(threads)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of the threads


def _replica(model: Segmenter) -> Segmenter:
    """A network in the same state with the same tensors, whose parameters have gradients of their own."""
    made: dict[int, Any] = {id(one): one.detach().requires_grad_(one.requires_grad) for one in model.parameters()}
    made |= {id(module): object.__new__(type(module)) for module in model.modules()}
    for module in model.modules():
        parts = {
            name: {key: made.get(id(part), part) for key, part in getattr(module, name).items()}
            for name in ("_parameters", "_modules")
        }
        made[id(module)].__dict__ = module.__dict__ | parts
    return made[id(model)]


def _move_gradients(source: nn.Module, target: nn.Module) -> None:
    for theirs, own in zip(source.parameters(), target.parameters(), strict=True):
        if theirs.grad is not None:
            own.grad = theirs.grad if own.grad is None else own.grad.add_(theirs.grad)
            theirs.grad = None
