"""What is wrong with a data folder is said in one line that names the file and what would be right."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crm.data.dataset import open_split
from crm.data.export import write_synthetic
from crm.data.specs import DATASETS
from tests.tiny import TINY_SETS

ROOT = Path(__file__).parents[1]
SIZE = (64, 96)
NOBODY = 65534


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """All three data sets, with nothing wrong."""
    folder = tmp_path_factory.mktemp("sound")
    for name, counts in {"mf": {"train": 8, "val": 3, "test": 3}, "pst900": {"train": 32, "test": 3},
                         "kp": {"train": 8, "val": 3, "test": 3}}.items():  # fmt: skip
        write_synthetic(name, folder / DATASETS[name].folder, counts=counts, size=SIZE)
    return folder


@pytest.fixture
def root(sound, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sound, tmp_path / "data"))


# One frame of each data set's train split, in the order of its files: pictures, then the label.
MF = ("mfnet/images/train_00001N.png", "mfnet/labels/train_00001N.png")
FRAME = "5_bag5_rect_rgb_frame0000000017.png"  # of a recording that the carve-out leaves in train
PST900 = tuple(f"pst900/train/{part}/{FRAME}" for part in ("rgb", "thermal", "labels"))
KP_PICTURES = tuple(f"kp/images/set03/V000/{part}/I00001.jpg" for part in ("visible", "lwir"))
KP = (*KP_PICTURES, "kp/labels/set03_V000_I00001.png")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:400])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scribble(path: Path) -> None:
    path.write_bytes(b"this is no picture at all")


def convert(mode: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with Image.open(path) as image:
            image.convert(mode).save(path)

    return spoil


def fill(mode: str, value: int, size: tuple[int, int] = SIZE) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        Image.new(mode, (size[1], size[0]), value).save(path)

    return spoil


def palette_77(path: Path) -> None:
    image = Image.new("P", (SIZE[1], SIZE[0]), 77)
    image.putpalette(list(range(256)) * 3)
    image.save(path)


def sixteen_bit(path: Path) -> None:
    with Image.open(path) as image:
        Image.fromarray(np.asarray(image).astype(np.uint16) * 257).save(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a frame of the train split."""

    file: str  # below the data root
    spoil: Callable[[Path], object]
    words: str  # after the file's path

    @property
    def dataset(self) -> str:
        return self.file.partition("/")[0].removesuffix("net")


UNREADABLE = "cannot be read as a picture: .*copy it again"
FRAMES = {
    "mf picture missing": Fault(MF[0], Path.unlink, r"is missing, but the list train\.txt names it"),
    "mf label missing": Fault(MF[1], Path.unlink, r"is missing, but the list train\.txt names it"),
    "mf picture truncated": Fault(MF[0], truncate, UNREADABLE),
    "mf label truncated": Fault(MF[1], lambda path: path.write_bytes(path.read_bytes()[:60]), UNREADABLE),
    "mf picture empty": Fault(MF[0], empty, r"is empty \(0 bytes\); it should have four channels.*: copy it again"),
    "mf label empty": Fault(MF[1], empty, r"is empty \(0 bytes\); it should have one 8-bit channel"),
    "mf picture is text": Fault(MF[0], scribble, "cannot be read as a picture: it has no known format"),
    "mf picture of three channels": Fault(MF[0], convert("RGB"), r"must have four channels.*\(RGBA\), not RGB"),
    "mf picture grey": Fault(MF[0], convert("L"), r"must have four channels.*not L \(one 8-bit channel\)"),
    "mf picture leads to itself": Fault(MF[0], loop, "a symbolic link that leads back to itself"),
    "mf picture is a folder": Fault(MF[0], folder_instead, "cannot be read: Is a directory"),
    "mf label of another size": Fault(MF[1], fill("L", 0, (63, 96)), "is 63x96 but its picture is 64x96"),
    "mf label id out of range": Fault(
        MF[1], fill("L", 9), r"has label id 9; MF has 0 to 8, and 255 for ignored pixels"
    ),
    "mf label in colours": Fault(MF[1], convert("RGB"), "must have one 8-bit channel of class ids, not RGB"),
    "mf label RGBA": Fault(
        MF[1], convert("RGBA"), r"must have one 8-bit channel of class ids, not RGBA \(four channels"
    ),
    "mf label of 16 bit": Fault(MF[1], sixteen_bit, r"must have one 8-bit channel of class ids, not I;16 \(16 bit\)"),
    "mf label of one bit": Fault(MF[1], convert("1"), r"must have one 8-bit channel of class ids, not 1 \(one bit\)"),
    "mf palette id out of range": Fault(MF[1], palette_77, "has label id 77; MF has 0 to 8"),
    "pst900 thermal missing": Fault(PST900[1], Path.unlink, r"is missing, but .*train/rgb names it"),
    "pst900 label missing": Fault(PST900[2], Path.unlink, r"is missing, but .*train/rgb names it"),
    "pst900 thermal of 16 bit": Fault(
        PST900[1], sixteen_bit, r"must have one 8-bit channel \(thermal/, not thermal_raw/\), not I;16"
    ),
    "pst900 thermal in colours": Fault(PST900[1], convert("RGB"), "must have one 8-bit channel .*, not RGB"),
    "pst900 thermal of another size": Fault(PST900[1], fill("L", 0, (32, 48)), "is 32x48 but its RGB picture is 64x96"),
    "pst900 picture grey": Fault(PST900[0], convert("L"), r"must have three 8-bit channels \(RGB\), not L"),
    "pst900 picture RGBA": Fault(PST900[0], convert("RGBA"), r"must have three 8-bit channels \(RGB\), not RGBA"),
    "pst900 label id out of range": Fault(PST900[2], fill("L", 5), "has label id 5; PST900 has 0 to 4, and 255"),
    "pst900 label of another size": Fault(PST900[2], fill("L", 0, (64, 95)), "is 64x95 but its picture is 64x96"),
    "kp picture missing": Fault(KP[0], Path.unlink, r"is missing, but the list train_night\.txt names it"),
    "kp thermal missing": Fault(KP[1], Path.unlink, r"is missing, but the list train_night\.txt names it"),
    "kp picture truncated": Fault(KP[0], truncate, UNREADABLE),
    "kp picture grey": Fault(KP[0], convert("L"), r"must have three 8-bit channels \(RGB\), not L"),
    "kp thermal of another size": Fault(KP[1], fill("RGB", 0, (32, 48)), "is 32x48 but its RGB picture is 64x96"),
    "kp thermal empty": Fault(KP[1], empty, r"is empty \(0 bytes\)"),
    "kp label 255": Fault(KP[2], fill("L", 255), "has label id 255; KP has 0 to 18, and 19 for ignored pixels"),
}


@pytest.mark.parametrize("fault", FRAMES.values(), ids=FRAMES)
def test_a_broken_frame_is_one_line_with_the_file_and_what_would_be_right(root, fault):
    path = root / fault.file
    fault.spoil(path)
    before = sorted(root.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_split(fault.dataset, "train", data_root=root, size=SIZE).verify()
    said = str(caught.value)
    assert said.startswith(str(path)) and re.search(fault.words, said), said
    assert "\n" not in said
    assert sorted(root.rglob("*")) == before


def lines(*names: str) -> Callable[[Path], object]:
    return lambda path: path.write_text("\n".join(names), encoding="utf-8")


LISTS = {
    "list missing": ("mfnet/train.txt", Path.unlink, r"train\.txt is missing; lists that are there: test, val"),
    "list empty": ("mfnet/train.txt", lines(), r"train\.txt lists no frame; it should have one frame's name per line"),
    "list of blank lines": ("mfnet/train.txt", lines("", "  ", ""), r"train\.txt lists no frame"),
    "list names a frame twice": ("mfnet/train.txt", lines("a", "b", "a"), r"train\.txt lists a 2 times"),
    "list is no text": ("mfnet/train.txt", lambda path: path.write_bytes(b"\xff\xfe\x00a"), r"train\.txt is not UTF-8"),
    "list leads to itself": ("mfnet/train.txt", loop, r"train\.txt .*a symbolic link that leads back to itself"),
    "list is a folder": ("mfnet/train.txt", folder_instead, r"train\.txt cannot be read: Is a directory"),
    "list names an absent frame": ("mfnet/train.txt", lines("00001D"),
                                   r"images/00001D\.png is missing, but the list train\.txt names it"),
    "night list missing": ("kp/train_night.txt", Path.unlink, r"train_night\.txt is missing; lists that are there"),
    "day list empty": ("kp/train_day.txt", lines(), r"train_day\.txt lists no frame"),
    "list of another data set": ("kp/train_day.txt", lines("00001D"),
                                 r"train_day\.txt lists '00001D'; names should be as in set00_V000_I00050"),
    "no pictures of a split": ("pst900/train/rgb", shutil.rmtree, r"train/rgb is missing; it should hold the colour"),
    "no picture in a split": ("pst900/train/rgb", lambda path: (shutil.rmtree(path), path.mkdir()),
                              r"train/rgb holds no picture; it should hold NAME\.png"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "spoil", "words"), LISTS.values(), ids=LISTS)
def test_a_wrong_list_is_named_with_what_would_be_right(root, file, spoil, words):
    spoil(root / file)
    dataset = file.partition("/")[0].removesuffix("net")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        open_split(dataset, "train", data_root=root, size=SIZE).verify()
    assert "\n" not in str(caught.value)


FOLDERS = {
    "no folder": ("mf", lambda root: root / "absent", "the folder .*absent does not exist. To get it, .*https://"),
    "an empty folder": ("kp", lambda root: (root / "new").mkdir() or root / "new",
                        "KP was not found: looked in .*new/kp and .*new for images/setAA. To get it"),
    "a file": ("mf", lambda root: root / "mfnet" / "train.txt", "MF was not found: looked in"),
    "a link to itself": ("mf", lambda root: (root / "x").symlink_to("x") or root / "x", "leads back to itself"),
    "MF for PST900": ("pst900", lambda root: root / "mfnet", "mfnet looks like MF: use the data set 'mf' for it"),
    "MF for KP": ("kp", lambda root: root / "mfnet", "mfnet looks like MF: use the data set 'mf' for it"),
    "KP for MF": ("mf", lambda root: root / "kp", "kp looks like KP: use the data set 'kp' for it"),
    "PST900 for MF": ("mf", lambda root: root / "pst900", "pst900 looks like PST900: use the data set 'pst900'"),
}  # fmt: skip


@pytest.mark.parametrize(("dataset", "give", "words"), FOLDERS.values(), ids=FOLDERS)
def test_a_wrong_folder_says_where_it_looked_and_what_it_found(root, dataset, give, words):
    with pytest.raises(FileNotFoundError, match=words) as caught:
        open_split(dataset, "train", data_root=give(root))
    assert "\n" not in str(caught.value)


# what is accepted


def test_windows_line_ends_blank_lines_and_a_mark_are_accepted(root):
    listing = root / "mfnet" / "train.txt"
    names = open_split("mf", "train", data_root=root).names
    listing.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(names).encode() + b"\r\n \r\n")
    assert open_split("mf", "train", data_root=root).names == names


def test_names_of_any_script_with_spaces_are_accepted(root):
    folder = root / "mfnet"
    for part in ("images", "labels"):
        (folder / part / "train_00001N.png").rename(folder / part / "übergang 夜 1N.png")
    (folder / "train.txt").write_text("übergang 夜 1N\n", encoding="utf-8")
    frame = open_split("mf", "train", data_root=root, size=SIZE)[0]
    assert frame.name == "übergang 夜 1N" and frame.night


def test_the_indexes_of_a_palette_are_the_ids(root):
    path = root / MF[1]
    plain = open_split("mf", "train", data_root=root, size=SIZE)[1].label
    with Image.open(path) as image:
        image.putpalette([channel for colour in DATASETS["mf"].colours for channel in colour])
        image.save(path)
    with Image.open(path) as image:
        assert image.mode == "P"
    assert np.array_equal(open_split("mf", "train", data_root=root, size=SIZE)[1].label, plain)


def test_ignored_pixels_are_accepted(root):
    for dataset, label, value in (("mf", MF[1], 255), ("pst900", PST900[2], 255), ("kp", KP[2], 19)):
        fill("L", value)(root / label)
        open_split(dataset, "train", data_root=root, size=SIZE).verify()


# as an unprivileged user


def as_nobody(root: Path, sound: Path, dataset: str) -> str:
    """What reading the train split says in a process without the rights of root."""
    script = f"""
import os, sys
from pathlib import Path
from crm.data.dataset import open_split
def read(root):
    open_split({dataset!r}, "train", data_root=Path(root), size={SIZE}).verify()
read(sys.argv[2])  # everything is imported while this process may still read Python's own files
os.setgid({NOBODY}); os.setuid({NOBODY})
try:
    read(sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(root), str(sound)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize(
    ("dataset", "file"),
    [("mf", MF[0]), ("mf", MF[1]), ("mf", "mfnet/train.txt"), ("mf", "mfnet/images"), ("mf", "mfnet"),
     ("pst900", PST900[1]), ("pst900", "pst900/train/rgb"), ("kp", KP[0]), ("kp", "kp/train_day.txt")],
)  # fmt: skip
def test_what_may_not_be_read_is_named(sound, dataset, file):
    # /tmp rather than pytest's folders, which only their owner may enter
    open_to_all = Path(shutil.copytree(sound, Path("/tmp") / f"crm-bad-input-{os.getpid()}", dirs_exist_ok=True))
    open_to_all.chmod(0o755)
    try:
        (open_to_all / file).chmod(0)
        said = as_nobody(open_to_all, sound, dataset)
    finally:
        shutil.rmtree(open_to_all)
    assert re.fullmatch(
        rf"PermissionError \S*{re.escape(file)}\S* may not be read by this user; .*\(chmod u\+r\)\n", said
    )


# through the command line


def crm(*arguments: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "crm", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "CRM_HOME": str(home)})  # fmt: skip


COMMANDS = ["mf picture truncated", "mf picture of three channels", "mf label id out of range", "kp picture missing"]


@pytest.mark.parametrize("name", COMMANDS)
def test_showing_a_broken_frame_ends_with_two_and_writes_nothing(root, tmp_path, name):
    fault = FRAMES[name]
    fault.spoil(root / fault.file)
    home = tmp_path / "home"
    done = crm("data", "show", fault.dataset, "--split", "train", "--data", root, home=home)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"crm: \S*{re.escape(fault.file)} {fault.words}.*\n", done.stderr)
    assert not done.stdout and not home.exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_training_on_a_broken_frame_ends_with_two_and_writes_nothing(root, tmp_path, name):
    fault = FRAMES[name]
    fault.spoil(root / fault.file)
    sets = [*TINY_SETS, "--set", f"data.dataset={fault.dataset}"]
    home = tmp_path / "home"
    done = crm("train", "synthetic_small", *sets, "--data", root, home=home)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"crm: \S*{re.escape(fault.file)} {fault.words}.*\n", done.stderr)
    assert not done.stdout and not home.exists()


def test_training_on_no_folder_ends_with_two(tmp_path):
    done = crm("train", "mf_small", "--data", tmp_path / "absent", home=tmp_path / "home")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "absent does not exist" in done.stderr
    assert not (tmp_path / "home").exists()
