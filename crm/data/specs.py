"""What each data set is: its classes, colours, splits, sizes and where its files lie.

Torch-free. Adding a data set in a known file layout is adding one spec.
"""

import re
from dataclasses import dataclass, field

RGB, THERMAL, BOTH, NEITHER = "rgb", "thermal", "both", "neither"  # the modalities a class shows in


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    name: str  # the key in DATASETS
    title: str  # as written in tables
    layout: str  # "generated", or a key of crm.data.files.LAYOUTS
    folder: str = ""  # below the data root
    classes: tuple[str, ...]  # index = id in the label image
    colours: tuple[tuple[int, int, int], ...]  # one per class, for pictures
    ignore_index: int = 255  # id of pixels that neither loss nor metric counts; a class id or 255
    splits: dict[str, int]  # name to number of frames, as published
    size: tuple[int, int]  # native height, width, pixels
    mean: tuple[float, float, float, float] = (123.675, 116.28, 103.53, 127.0)  # R, G, B, thermal on 0..255
    std: tuple[float, float, float, float] = (58.395, 57.12, 57.375, 60.0)
    night_pattern: str  # a regular expression that the names of night frames match
    shows_in: dict[str, str] = field(default_factory=dict)  # synthetic only: class to modality, documentation
    seed: int = 0  # synthetic only: of the data set itself, the same for every training seed
    source: str  # who made it
    get: str  # what a person without the files does

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.colours):
            raise ValueError(f"{self.name}: {len(self.classes)} classes but {len(self.colours)} colours")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"{self.name}: a class is named twice in {', '.join(self.classes)}")
        if len(self.mean) != 4 or len(self.std) != 4 or min(self.std) <= 0:
            raise ValueError(f"{self.name}: mean and std take four channels, R, G, B, thermal, and std is above 0")
        if not (0 <= self.ignore_index <= 255):
            raise ValueError(f"{self.name}: ignore_index must fit into uint8, not {self.ignore_index}")
        if stray := set(self.shows_in) - set(self.classes):
            raise ValueError(f"{self.name}: shows_in names {', '.join(sorted(stray))}, which is no class")
        re.compile(self.night_pattern)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def is_night(self, name: str) -> bool:
        """Whether a frame's name says night."""
        return re.search(self.night_pattern, name) is not None


SYNTHETIC = DatasetSpec(
    name="synthetic",
    title="Synthetic road scenes",
    layout="generated",
    folder="synthetic",  # where the written form lies, should someone write it
    classes=("background", "road", "car", "person", "cone", "vent"),
    colours=(
        (38, 42, 56),
        (118, 96, 140),
        (74, 130, 232),
        (226, 72, 84),
        (248, 164, 44),
        (246, 226, 130),
    ),
    splits={"train": 256, "val": 32, "test": 40},
    size=(240, 320),
    mean=(64.6, 65.6, 67.7, 103.2),  # of its training split, so that the mean image is its own
    std=(56.9, 57.1, 60.5, 43.5),
    night_pattern=r"N$",
    shows_in={
        "background": BOTH,
        "road": BOTH,
        "car": BOTH,
        "person": BOTH,
        "cone": RGB,
        "vent": THERMAL,
    },
    seed=20230317,
    source="crm.data.synthetic",
    get="nothing to get: made on the fly",
)

MF = DatasetSpec(
    name="mf",
    title="MF",
    layout="mf",
    folder="mfnet",
    classes=("unlabeled", "car", "person", "bike", "curve", "car_stop", "guardrail", "color_cone", "bump"),
    colours=(
        (0, 0, 0),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
        (0, 0, 192),
        (128, 128, 0),
        (64, 64, 128),
        (192, 128, 128),
        (192, 64, 0),
    ),
    splits={"train": 784, "val": 392, "test": 393, "test_day": 205, "test_night": 188},
    size=(480, 640),
    night_pattern=r"N$",
    source="Ha et al., MFNet: Towards Real-Time Semantic Segmentation for Autonomous Vehicles with Multi-Spectral "
    "Scenes, IROS 2017",
    get="ask for the archive at https://www.mi.t.u-tokyo.ac.jp/static/projects/mil_multispectral/ and unpack it so "
    "that mfnet/ holds images/, labels/, train.txt, val.txt and test.txt",
)

DATASETS = {"synthetic": SYNTHETIC, "mf": MF}
