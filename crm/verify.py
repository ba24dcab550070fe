"""Evaluating some images of a trained run again, to compare with what is stored, bit by bit."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crm.checkpoint import load_checkpoint
from crm.conditions import condition
from crm.confusion import load_evaluation
from crm.data.dataset import open_run_split
from crm.data.specs import DATASETS
from crm.evaluate import AT_ONCE, at_once, evaluate
from crm.model.segmenter import build_segmenter
from crm.records import evaluation, read_config, trained_on


@dataclass(frozen=True)
class Verified:
    images: int  # that were evaluated again, of each evaluation
    evaluations: int
    differing: int  # pairs of image and evaluation whose matrices are not the stored ones

    def __str__(self) -> str:
        said = "all as they are stored" if not self.differing else f"{self.differing} are not what is stored"
        return f"evaluated again: {self.images} images x {self.evaluations} evaluations, {said}"


def verified_images(folder: Path, names: Sequence[str], count: int, data: Path | None, device: str) -> Verified:
    """Compares the first images of evaluations, `count` of them or as many more as fill the batch they were in.

    Batches are those of the evaluation, since another batch may round otherwise.

    Args:
        names: `<selection>/<condition>`. ValueError without any, for nothing else can be verified so.
        device: the kind that evaluated them; another one rounds otherwise.
    """
    if not names:
        raise ValueError(f"--verify evaluates again, and no evaluation of run {folder.name} is stale")
    config = read_config(folder)
    trained = DATASETS[trained_on(folder)]
    differing, images = 0, 0
    for selection in sorted({name.partition("/")[0] for name in names}):
        path = folder / "checkpoints" / f"{selection}.safetensors"
        if not path.exists():
            raise ValueError(f"{path} is not there, so nothing can be verified")
        model = build_segmenter(config.model, trained.num_classes).to(device)
        model.load_state_dict(load_checkpoint(path).weights)
        own = [condition(name.partition("/")[2]) for name in names if name.partition("/")[0] == selection]
        for split_name in sorted({one.split for one in own}):
            split = open_run_split(config.data, split_name, data)
            batch = at_once(max(config.batch, AT_ONCE), split.size, device)
            images = min(len(split), -(-count // batch) * batch)
            wanted = [one for one in own if one.split == split_name]
            for one, found in evaluate(model, split.only(range(images)), wanted, batch, device, trained):
                stored = load_evaluation(evaluation(folder, selection, one))
                same = list(stored.names[:images]) == list(found.names) and (
                    stored.confusion[:images].shape == found.confusion.shape
                )
                equal = (stored.confusion[:images] == found.confusion).all(axis=(1, 2)) if same else np.zeros(images)
                differing += images - int(equal.sum())
    return Verified(images, len(names), differing)
