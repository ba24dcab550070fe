"""The synthetic scenes as files, in the layouts of the real data sets: a stand-in for frames one does not have.

The pictures are the same; names and class ids are those of the data set that is stood in for. Torch-free.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from crm.data import synthetic
from crm.data.files import LAYOUTS
from crm.data.frames import Frame
from crm.data.specs import DATASETS
from crm.names import chosen

Tell = Callable[[str, int, int], None]  # split, frames written, frames in all

# What each synthetic class is called there: the nearest thing the data set has, by name. PST900 has four objects and no
# road; KP has no vent, whose pixels are left out of loss and metric as void ones are.
CLASSES = {
    "mf": ("unlabeled", "unlabeled", "car", "person", "color_cone", "bump"),
    "pst900": ("background", "background", "backpack", "survivor", "fire_extinguisher", "hand_drill"),
    "kp": ("building", "road", "car", "person", "traffic sign", None),
}

KP_SETS = {"train": (0, 3), "val": (6, 10), "test": (7, 9)}  # recording sets by day and by night, as in the real lists
PST900_FIRST = {"train": 1, "test": 501}  # number of a split's first recording
RECORDING = 4  # frames of one recording of PST900: few, so that a small train split has several


def write_synthetic(
    dataset: str,
    folder: Path,
    *,
    counts: Mapping[str, int],
    size: tuple[int, int] | None = None,
    seed: int | None = None,
    tell: Tell = lambda split, done, count: None,
) -> Path:
    """Writes `counts` scenes of each split in the layout of `dataset` ("mf", "pst900", "kp") and returns the folder.

    `size` is the data set's own by default, `seed` the synthetic spec's. Frames are named as the data set names them.
    ValueError for a split the data set has no files of, and for a folder that holds something already.
    """
    spec = chosen("layout", dataset, {name: DATASETS[name] for name in CLASSES})
    for split, count in counts.items():
        if split not in spec.splits:
            raise ValueError(f"{spec.title} has no {split} split on disk; it has {', '.join(spec.splits)}")
        if count < 2:
            raise ValueError(f"{split} needs at least 2 frames, one by day and one at night, not {count}")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder")
    table = labels_as(dataset)
    seed = DATASETS["synthetic"].seed if seed is None else seed

    def frames(split: str, count: int) -> Iterator[Frame]:
        for index in range(count):
            frame = synthetic.scene(seed, split, index, size or spec.size)
            name = NAMES[dataset](split, index)
            yield replace(frame, name=name, label=table[frame.label], night=spec.is_night(name))
            tell(split, index + 1, count)

    return LAYOUTS[spec.layout].write({split: frames(split, count) for split, count in counts.items()}, folder)


def labels_as(dataset: str) -> np.ndarray:
    """The data set's class id for each synthetic class id, uint8 (6,)."""
    spec = DATASETS[dataset]
    ids = [spec.ignore_index if name is None else spec.classes.index(name) for name in CLASSES[dataset]]
    return np.array(ids, np.uint8)


def _name_kp(split: str, index: int) -> str:
    return f"set{KP_SETS[split][index % 2]:02d}_V000_I{index:05d}"


def _name_pst900(split: str, index: int) -> str:
    number = PST900_FIRST[split] + index // RECORDING
    return f"{number}_bag{number}_rect_rgb_frame{index:010d}"


NAMES = {"mf": synthetic.name, "pst900": _name_pst900, "kp": _name_kp}
