"""What each data set is: its classes, colours, splits, sizes and where its files lie.

Torch-free. Adding a data set in a known file layout is adding one spec.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

RGB, THERMAL, BOTH, NEITHER = "rgb", "thermal", "both", "neither"  # the modalities a class shows in


@dataclass(frozen=True, kw_only=True)
class CarveOut:
    """A validation split for a data set that has none: whole recordings held out of train.

    Whole, because neighbouring frames of one recording are nearly the same picture.
    """

    recording: str  # a regular expression; what it matches at the start of a frame's name is the recording
    share: float  # of train's frames that are held out, at most, unless every recording is larger

    def held_out(self, names: Sequence[str]) -> set[str]:
        """The frames of train that are "val".

        Recordings are taken in the order of the SHA-256 of their names, each if the share allows it, so that the choice
        depends on the names alone. If none is small enough the smallest is taken. ValueError if there is one recording.
        """
        frames: dict[str, list[str]] = {}
        for name in names:
            match = re.match(self.recording, name)
            frames.setdefault(match.group() if match else name, []).append(name)
        order = sorted(frames, key=lambda recording: sha256(recording.encode()).hexdigest())
        if len(order) < 2:
            raise ValueError(f"all frames are of the recording {order[0]!r}: none can be held out for validation")
        held: list[str] = []
        for recording in order:
            if len(held) + len(frames[recording]) <= self.share * len(names):
                held += frames[recording]
        return set(held or min((frames[recording] for recording in order), key=len))


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
    night_pattern: str = ""  # a regular expression that the names of night frames match; empty: day and night unknown
    carve_out: CarveOut | None = None  # for a data set without a val split (config: data.carve_val)
    lists: dict[str, dict[int, str]] = field(default_factory=dict)  # split to what lists of that length are known to be
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
        if self.carve_out and "val" in self.splits:
            raise ValueError(f"{self.name}: has a val split, so nothing needs to be carved out of train")
        re.compile(self.night_pattern)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def is_night(self, name: str) -> bool:
        """Whether a frame's name says night; False where names do not say."""
        return bool(self.night_pattern) and re.search(self.night_pattern, name) is not None

    def list_variant(self, split: str, names: Sequence[str]) -> str | None:
        """Which known variant of a split's list these names are, in words; None for a list of no known length.

        Flipped copies (`*_flip`) are recognised by name, the rest by count.
        """
        flipped = sum(name.endswith("_flip") for name in names)
        if flipped:
            return f"{len(names) - flipped} frames and {flipped} flipped copies"
        official = "official" if self.splits.get(split) == len(names) else None
        return official or self.lists.get(split, {}).get(len(names))


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
    night_pattern=r"N(_flip)?$",
    lists={"train": {1176: "train and val merged", 1568: "as long as train with flipped copies"}},
    source="Ha et al., MFNet: Towards Real-Time Semantic Segmentation for Autonomous Vehicles with Multi-Spectral "
    "Scenes, IROS 2017",
    get="ask for the archive at https://www.mi.t.u-tokyo.ac.jp/static/projects/mil_multispectral/ and unpack it so "
    "that mfnet/ holds images/, labels/, train.txt, val.txt and test.txt",
)

PST900 = DatasetSpec(
    name="pst900",
    title="PST900",
    layout="pst900",
    folder="pst900",
    classes=("background", "fire_extinguisher", "backpack", "hand_drill", "survivor"),
    colours=((0, 0, 0), (0, 0, 255), (0, 255, 0), (255, 0, 0), (255, 255, 255)),
    splits={"train": 597, "test": 288},  # as found on disk; the authors' page says 606 and 288
    lists={"train": {606: "as many as the authors' page says"}},
    size=(720, 1280),
    # Names are as in 31_bag1a_rect_rgb_frame0000000007: a recording is what stands before "_rect".
    carve_out=CarveOut(recording=r".+?(?=_rect|_frame|\d+\D*$)", share=1 / 8),
    source="Shivakumar et al., PST900: RGB-Thermal Calibration, Dataset and Segmentation Network, ICRA 2020",
    get="take the link at https://github.com/ShreyasSkandanS/pst900_thermal_rgb and unpack it so that pst900/ holds "
    "train/ and test/, each with rgb/, thermal/ and labels/",
)

KP = DatasetSpec(
    name="kp",
    title="KP",
    layout="kp",
    folder="kp",
    # The 19 train ids of Cityscapes, with its colours.
    classes=(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    colours=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ),
    ignore_index=19,
    splits={
        "train": 499,
        "val": 140,
        "test": 311,
        "train_day": 261,
        "train_night": 238,
        "val_day": 64,
        "val_night": 76,
        "test_day": 178,
        "test_night": 133,
    },
    size=(512, 640),
    night_pattern=r"^set(03|04|05|09|10|11)_",  # a recording set is by day or by night as a whole
    source="Kim et al., MS-UDA: Multi-Spectral Unsupervised Domain Adaptation for Thermal Image Semantic Segmentation, "
    "RA-L 2021; pictures of the KAIST multispectral pedestrian data set, Hwang et al., CVPR 2015",
    get="take the labels at https://github.com/yeong5366/MS-UDA, the KAIST pictures and the lists of the released CRM "
    "code, so that kp/ holds images/setAA/VBBB/{visible,lwir}/, labels/ and SPLIT_day.txt and SPLIT_night.txt",
)

DATASETS = {"synthetic": SYNTHETIC, "mf": MF, "pst900": PST900, "kp": KP}
