"""The batches of a run: which images a step takes, how they are augmented, and worker processes that prepare them.

A batch is a function of (seed, step) and nothing else. So batches are the same with any number of workers, and a run
resumed at any step gets the ones it would have had.
"""

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import Generator
from torch.utils.data import DataLoader, Dataset

from crm.config import Config
from crm.data.dataset import Split
from crm.data.specs import DatasetSpec
from crm.data.transforms import Batch, Pair, augment, collate
from crm.data.views import GROUPS, VIEWS, Source
from crm.names import chosen as chosen_from
from crm.randomness import derive

AHEAD = 2  # batches each worker prepares before they are asked for
GRACE = 10  # seconds a worker goes on after a SIGTERM


def batches(config: Config, split: Split, start: int, workers: int, places: range | None = None) -> Iterator[Batch]:
    """The batches of steps `start` to the last, in order; made by this process, or ahead of time by `workers` others.

    Raises ValueError if the split has too few frames, and for a frame what reading it raised.
    """
    if config.data.drop_last and len(split) < config.batch:
        raise ValueError(
            f"data.drop_last leaves nothing of {len(split)} frames in batches of {config.batch}: lower the batch"
        )
    if not workers:
        yield from (make_batch(config, split, step, places) for step in range(start, config.steps))
        return
    split.share()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: a user's choice
        loader = iter(
            DataLoader(
                _Steps(config, split, places),
                sampler=range(start, config.steps),
                batch_size=None,  # an item is a whole batch
                num_workers=workers,
                prefetch_factor=AHEAD,
                worker_init_fn=_leave_signals_to_the_parent,
                multiprocessing_context="fork",  # so that workers share the decoded frames
                generator=torch.Generator(),  # else starting workers would draw from the global one
            )
        )
    try:
        for made in loader:
            if isinstance(made, Exception):
                raise made
            yield made
    finally:
        del loader  # ends the workers now, and not when the last traceback that leads here is let go


class _Steps(Dataset[Batch | Exception]):
    """Batches by step, for worker processes."""

    def __init__(self, config: Config, split: Split, places: range | None) -> None:
        self.config, self.split, self.places = config, split, places

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return make_batch(self.config, self.split, step, self.places)
        except (ValueError, OSError) as error:  # handed over as it is: torch would wrap it in a page of traceback
            return error


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's signals reach every process of a job, but only the parent answers them.

    It still needs a batch until it has written its checkpoint, so SIGTERM ends a worker after a while only. A worker
    leaves earlier when its parent says so, or is gone.
    """
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))  # 0: torch raises in the parent for any other
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def make_batch(config: Config, split: Split, step: int, places: range | None = None) -> Batch:
    """The images of a step, augmented: a function of (seed, step) and the image's place in the batch.

    Args:
        places: those that are wanted, where several processes share a batch; None is all.
    """
    chosen = indices(config.seed, len(split), config.batch, step, config.data.drop_last)
    wanted = places or range(config.batch)

    @cache
    def augmented(place: int, purpose: str) -> Pair:
        generator = Generator().manual_seed(derive(config.seed, step, purpose, place))
        return augment(split[chosen[place]], config.data, generator)

    batch = collate([augmented(place, "augment") for place in wanted], split.spec)
    if config.masking.view == "clean":
        return batch
    return replace(batch, view=view(config, step, wanted, config.batch, augmented, split.spec))


def view(
    config: Config,
    step: int,
    places: Iterable[int],
    images: int,
    augmented: Callable[[int, str], Pair],
    spec: DatasetSpec,
) -> Batch:
    """What the masked passes look at in these places of a batch of so many images, by `masking.view`.

    Args:
        augmented: the frame of a place, augmented by the draws of a purpose ("augment" for the clean input).
    """
    make = chosen_from("view", config.masking.view, VIEWS)
    sources = (
        Source(
            augmented=augmented,
            place=place,
            batch=images,
            mean=spec.mean,
            families=chosen_from("group of corruptions", config.masking.corruptions, GROUPS),
            generator=Generator().manual_seed(derive(config.seed, step, "view", place)),
        )
        for place in places
    )
    return collate([make(source) for source in sources], spec)


def indices(seed: int, images: int, batch: int, step: int, drop_last: bool) -> list[int]:
    """The images of a step. Each epoch is one permutation.

    Epochs follow one another without a gap, or, with `drop_last`, begin with a new batch.
    """
    usable = images // batch * batch if drop_last else images
    places = (divmod(position, usable) for position in range(step * batch, (step + 1) * batch))
    return [_permutation(seed, images, epoch)[place] for epoch, place in places]


_order: dict[tuple[int, int, int], list[int]] = {}


def _permutation(seed: int, images: int, epoch: int) -> list[int]:
    """The order of one epoch; the last two are remembered."""
    key = (seed, images, epoch)
    if key not in _order:
        while len(_order) > 1:
            del _order[next(iter(_order))]
        generator = Generator().manual_seed(derive(seed, "order", epoch))
        _order[key] = torch.randperm(images, generator=generator).tolist()
    return _order[key]
