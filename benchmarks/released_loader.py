"""Training images prepared as in the released code, from our own reading and jitter.

Every picture is decoded each time it is used, becomes float32 at once and is resized whole before the crop is taken
from it; labels are float64; an item is one image, and worker processes hand over lists of them. What the released
loader does besides, and here the training step does (a mask for every class, the pair of random masks), is left out of
both sides. Hue and saturation go through our HSV, not through OpenCV's.

h w = image, H W = crop
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from crm.config import Config
from crm.data.files import listed, read_mf
from crm.data.specs import DATASETS
from crm.data.transforms import DRAWS, released_jitter, resized

SPEC = DATASETS["mf"]


class Released(Dataset[tuple[Tensor, Tensor]]):
    """Images of a folder in the MF layout, one by one."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder, self.names = config, folder, listed(SPEC, folder, "train")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        data = self.config.data
        draws = torch.rand(DRAWS, generator=Generator().manual_seed(index), dtype=torch.float64).tolist()
        frame = read_mf(SPEC, self.folder, "train", self.names[index])
        assert frame.label is not None
        both = np.concatenate([frame.rgb, frame.thermal[..., None]], axis=2).astype(np.float32)
        image, label = torch.from_numpy(both).permute(2, 0, 1), torch.from_numpy(frame.label.astype(np.float64))
        size = resized(frame.size, data, draws[0])
        image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        label = F.interpolate(label[None, None], size, mode="nearest")[0, 0]
        (height, width), (rows, columns) = size, data.crop
        top, left = int(draws[1] * (height - rows + 1)), int(draws[2] * (width - columns + 1))
        image, label = (each[..., top : top + rows, left : left + columns] for each in (image, label))
        image = released_jitter(image, data.jitter, draws[4:])
        if draws[3] < data.flip:
            image, label = image.flip(-1), label.flip(-1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (SPEC.mean, SPEC.std))
        return F.pad((image - mean) / std, (0, -columns % 32, 0, -rows % 32)), label.long()


def released_batches(config: Config, folder: Path, workers: int) -> Iterator[list[Any]]:
    """One epoch."""
    made = DataLoader(
        Released(config, folder), batch_size=config.batch, shuffle=True, drop_last=True, num_workers=workers,
        collate_fn=list, multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    yield from made
