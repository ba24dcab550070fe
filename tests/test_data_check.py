"""`crm data check` and `crm data synth`: every kind of fault is found and named, and sound data pass."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from crm.config import Config, override
from crm.data import synthetic
from crm.data.check import Report, check
from crm.data.dataset import open_run_split, open_split
from crm.data.export import write_synthetic
from crm.data.findings import KINDS
from crm.data.measure import CLEAR, mean_and_deviation, measure, misalignment, typical
from crm.data.specs import DATASETS
from tests.test_cli import crm

SIZE = (96, 128)
COUNTS = {
    "mf": {"train": 6, "val": 4, "test": 4},
    "pst900": {"train": 8, "test": 4},
    "kp": {"train": 6, "val": 4, "test": 4},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Synthetic scenes in each layout, without a fault."""
    root = tmp_path_factory.mktemp("sound")
    for name, counts in COUNTS.items():
        write_synthetic(name, root / DATASETS[name].folder, counts=counts, size=SIZE)
    return root


@pytest.fixture
def copied(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "data"))


def kinds(report: Report, level: str = "error") -> list[str]:
    return sorted({finding.kind for finding in report.findings if finding.level == level})


# sound data


@pytest.mark.parametrize("name", COUNTS)
def test_sound_data_have_no_error(name, sound):
    report = check(name, sound)
    assert report.errors == 0 and "subset" in kinds(report, "note")
    assert {split: facts["usable"] for split, facts in report.splits.items() if split != "val"} == {
        "train": {"mf": 6, "pst900": 4, "kp": 6}[name],
        "test": 4,
    }
    assert report.splits["val"]["usable"] == 4  # of PST900, carved out of train


def test_facts_are_those_of_the_pixels(sound):
    facts = check("mf", sound).splits["train"]
    split = open_split("mf", "train", data_root=sound, size=SIZE)
    pixels = np.concatenate([np.dstack([frame.rgb, frame.thermal]).reshape(-1, 4) for frame in split]).astype(float)
    labels = np.concatenate([frame.label.ravel() for frame in split])
    assert facts["mean"] == pytest.approx(pixels.mean(axis=0), abs=0.006)
    assert facts["deviation"] == pytest.approx(pixels.std(axis=0), abs=0.006)
    assert (facts["day"], facts["night"], facts["size"]) == (3, 3, list(SIZE))
    for number, name in enumerate(DATASETS["mf"].classes):
        assert facts["classes"][name] == pytest.approx(100 * (labels == number).mean(), abs=1e-4)


def test_the_report_does_not_depend_on_the_number_of_threads(sound):
    one, four = (check("mf", sound, threads=threads) for threads in (1, 4))
    assert one == four


# planted faults

Plant = Callable[[Path], str]  # plants a fault into a data set's folder and says which file is to be named


def repaint(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


def names(folder: Path, split: str) -> list[str]:
    return (folder / f"{split}.txt").read_text().split()


def add_names(folder: Path, split: str, more: list[str]) -> None:
    (folder / f"{split}.txt").write_text("\n".join([*names(folder, split), *more]) + "\n")


def add_copies(folder: Path, split: str, count: int) -> None:
    """More names for a split, all of one frame of it."""
    more = [f"copy_{number}D" for number in range(count)]
    for name in more:
        for part in ("images", "labels"):
            os.link(folder / part / f"{names(folder, split)[0]}.png", folder / part / f"{name}.png")
    add_names(folder, split, more)


def no_label(folder: Path) -> str:
    (folder / "labels" / f"{names(folder, 'val')[0]}.png").unlink()
    return f"labels/{names(folder, 'val')[0]}.png"


def no_list(folder: Path) -> str:
    (folder / "val.txt").unlink()
    return "val.txt"


def empty_list(folder: Path) -> str:
    (folder / "val.txt").write_text("\n\n")
    return "val.txt"


def truncated(folder: Path) -> str:
    path = folder / "images" / f"{names(folder, 'test')[1]}.png"
    path.write_bytes(path.read_bytes()[:900])
    return f"images/{path.name}"


def no_bytes(folder: Path) -> str:
    path = folder / "labels" / f"{names(folder, 'test')[1]}.png"
    path.write_bytes(b"")
    return f"labels/{path.name}"


def link_to_itself(folder: Path) -> str:
    path = folder / "labels" / f"{names(folder, 'test')[1]}.png"
    path.unlink()
    path.symlink_to(path)
    return f"labels/{path.name}"


def three_channels(folder: Path) -> str:
    path = folder / "images" / f"{names(folder, 'train')[0]}.png"
    repaint(path, lambda image: image[..., :3])
    return f"images/{path.name}"


def coloured_label(folder: Path) -> str:
    path = folder / "labels" / f"{names(folder, 'train')[0]}.png"
    repaint(path, lambda label: np.dstack([label] * 4))
    return f"labels/{path.name}"


def wrong_id(folder: Path) -> str:
    path = folder / "labels" / f"{names(folder, 'train')[0]}.png"
    repaint(path, lambda label: np.where(label == 0, 9, label).astype(np.uint8))
    return f"labels/{path.name}"


def small_label(folder: Path) -> str:
    path = folder / "labels" / f"{names(folder, 'train')[0]}.png"
    repaint(path, lambda label: label[::2, ::2])
    return f"labels/{path.name}"


def small_frame(folder: Path) -> str:
    for part in ("images", "labels"):
        repaint(folder / part / f"{names(folder, 'train')[2]}.png", lambda values: values[::2, ::2])
    return f"images/{names(folder, 'train')[2]}.png"


def too_many(folder: Path) -> str:
    add_copies(folder, "test", DATASETS["mf"].splits["test"])
    return "test.txt"


def in_two_lists(folder: Path) -> str:
    add_names(folder, "test", names(folder, "train")[:1])
    return "test.txt"


def same_pixels(folder: Path) -> str:
    here, there = names(folder, "test")[0], names(folder, "train")[0]
    Image.open(folder / "images" / f"{there}.png").save(folder / "images" / f"{here}.png", compress_level=1)
    return f"images/{here}.png"


def same_thermal(folder: Path) -> str:
    here, there = (folder / "images" / f"{names(folder, split)[0]}.png" for split in ("test", "train"))
    other = np.array(Image.open(there))
    repaint(here, lambda image: np.dstack([image[..., :3], other[..., 3]]))
    return f"images/{here.name}"


def constant_thermal(folder: Path) -> str:
    path = folder / "images" / f"{names(folder, 'train')[1]}.png"
    repaint(path, lambda image: np.dstack([image[..., :3], np.full(SIZE, 255, np.uint8)]))
    return f"images/{path.name}"


def green_as_thermal(folder: Path) -> str:
    path = folder / "images" / f"{names(folder, 'train')[1]}.png"
    repaint(path, lambda image: np.dstack([image[..., :3], 255 - image[..., 1] // 2]))  # other contrast, inverted
    return f"images/{path.name}"


def all_ignored(folder: Path) -> str:
    path = folder / "labels" / f"{names(folder, 'train')[1]}.png"
    repaint(path, lambda label: np.full_like(label, 255))
    return f"labels/{path.name}"


def labels_without_objects(folder: Path) -> str:
    for name in names(folder, "val"):
        repaint(folder / "labels" / f"{name}.png", np.zeros_like)
    return "labels"


def night_in_the_day_list(folder: Path) -> str:
    (folder / "test_day.txt").write_text("\n".join(names(folder, "test")))
    return "test_day.txt"


def strange_name_in_the_night_list(folder: Path) -> str:
    (folder / "test_night.txt").write_text(names(folder, "train")[1])
    return "test_night.txt"


ERRORS = {
    no_label: "missing",
    no_list: "split",
    empty_list: "split",
    night_in_the_day_list: "split",
    strange_name_in_the_night_list: "split",
    truncated: "unreadable",
    no_bytes: "unreadable",
    link_to_itself: "missing",
    three_channels: "channels",
    coloured_label: "channels",
    wrong_id: "label ids",
    small_label: "mismatch",
    small_frame: "size",
    too_many: "count",
    in_two_lists: "overlap",
    same_pixels: "duplicate",
    same_thermal: "duplicate",
    constant_thermal: "constant",
    green_as_thermal: "copy",
    all_ignored: "ignored",
    labels_without_objects: "mostly empty",
}


@pytest.mark.parametrize("plant", ERRORS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_an_error_that_names_the_file(plant, copied):
    file = plant(copied / "mfnet")
    report = check("mf", copied)
    assert kinds(report) == [ERRORS[plant]]
    found = next(finding for finding in report.findings if finding.kind == ERRORS[plant])
    assert found.file.endswith(file) and file in found.message and "\n" not in found.message


def test_several_faults_are_all_found_and_the_check_goes_on(copied):
    for plant in (no_label, truncated, wrong_id, in_two_lists):
        plant(copied / "mfnet")
    report = check("mf", copied)
    assert kinds(report) == ["label ids", "missing", "overlap", "unreadable"]
    assert {split: facts["usable"] for split, facts in report.splits.items()} == {"train": 5, "val": 3, "test": 3}


def test_both_files_of_a_frame_that_is_not_there_are_named(copied):
    add_names(copied / "mfnet", "train", ["nobody"])
    found = [finding.file for finding in check("mf", copied).findings if finding.kind == "missing"]
    assert [Path(file).parent.name for file in found] == ["images", "labels"]


# worth knowing, not wrong


def test_files_that_no_list_names_are_noted_frame_by_frame(copied):
    folder = copied / "mfnet"
    left = names(folder, "train")[-1]
    (folder / "train.txt").write_text("\n".join(names(folder, "train")[:-1]))
    (folder / "images" / "Thumbs.db").write_text("")
    report = check("mf", copied)
    found = [finding.file for finding in report.findings if finding.kind == "surplus"]
    assert report.errors == 0
    assert sorted(Path(file).name for file in found) == ["Thumbs.db", f"{left}.png"]


def test_a_label_without_an_object_is_a_note_as_real_sets_have_some(copied):
    name = names(copied / "mfnet", "train")[0]
    repaint(copied / "mfnet" / "labels" / f"{name}.png", np.zeros_like)
    report = check("mf", copied)
    assert report.errors == 0
    assert [Path(one.file).name for one in report.findings if one.kind == "empty label"] == [f"{name}.png"]


def test_nearly_the_same_picture_in_another_split_is_a_note(copied):
    folder = copied / "mfnet" / "images"
    here, there = names(copied / "mfnet", "test")[0], names(copied / "mfnet", "train")[0]
    image = np.array(Image.open(folder / f"{there}.png")).astype(float)
    noisy = np.roll(image, 1, axis=1) * 0.9 + np.random.default_rng(0).normal(0, 6, image.shape) + 8
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{here}.png")
    report = check("mf", copied)
    found = [finding for finding in report.findings if finding.kind == "near across"]
    assert report.errors == 0
    assert [Path(finding.file).stem for finding in found] == [here] and there in found[0].message


def test_the_same_pixels_twice_in_one_split_are_a_note(copied):
    folder = copied / "mfnet" / "images"
    first, second = names(copied / "mfnet", "train")[:2]
    shutil.copy(folder / f"{first}.png", folder / f"{second}.png")
    report = check("mf", copied)
    assert report.errors == 0
    assert [Path(one.file).stem for one in report.findings if one.kind == "repeated"] == [second]


def test_absent_classes_are_named_per_split(copied):
    for name in names(copied / "mfnet", "val"):
        path = copied / "mfnet" / "labels" / f"{name}.png"
        repaint(path, lambda label: np.where(label == 2, 1, label).astype(np.uint8))
    found = [finding for finding in check("mf", copied).findings if finding.kind == "absent class"]
    assert {finding.split for finding in found} >= {"", "val"}
    assert any("no person" in finding.message and finding.split == "val" for finding in found)


def test_flipped_and_merged_lists_are_known_variants(copied):
    folder = copied / "mfnet"
    for name in names(folder, "train"):
        for part in ("images", "labels"):
            picture = Image.open(folder / part / f"{name}.png")
            picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / part / f"{name}_flip.png")
    add_names(folder, "train", [f"{name}_flip" for name in names(folder, "train")])
    report = check("mf", copied)
    assert report.errors == 0
    assert any("6 flipped copies" in one.message for one in report.findings if one.kind == "variant")


def test_train_and_val_merged_is_a_variant_and_says_what_val_is_worth(copied):
    folder = copied / "mfnet"
    add_copies(folder, "train", 1176 - 10)
    add_names(folder, "train", names(folder, "val"))
    report = check("mf", copied)
    said = " ".join(one.message for one in report.findings if one.kind == "variant")
    assert report.errors == 0
    assert "train and val merged" in said and "4 frames of val are in train too" in said


# other layouts


@pytest.mark.parametrize("name", ["pst900", "kp"])
def test_thermal_of_another_size_is_found(name, copied):
    part = {"pst900": "test/thermal/*.png", "kp": "images/set07/V000/lwir/*.jpg"}[name]
    path = min((copied / name).glob(part))
    repaint(path, lambda heat: heat[:-2])
    found = [finding for finding in check(name, copied).findings if finding.level == "error"]
    assert [(finding.kind, finding.file) for finding in found] == [("mismatch", str(path))]


def test_raw_thermal_in_place_of_the_picture_is_found(copied):
    path = min((copied / "pst900/test/thermal").iterdir())
    Image.fromarray(np.array(Image.open(path)).astype(np.uint16) * 256).save(path)
    found = [finding for finding in check("pst900", copied).findings if finding.level == "error"]
    assert [(finding.kind, finding.file) for finding in found] == [("channels", str(path))]


def test_grey_rgb_in_place_of_thermal_is_found_through_jpeg(copied):
    path = min((copied / "kp/images/set06/V000/lwir").iterdir())
    with Image.open(path.parent.parent / "visible" / path.name) as rgb:
        rgb.convert("L").convert("RGB").save(path, quality=85)
    found = [finding for finding in check("kp", copied).findings if finding.level == "error"]
    assert [(finding.kind, finding.file) for finding in found] == [("copy", str(path))]


def test_one_recording_cannot_be_carved_and_train_is_checked_all_the_same(copied):
    for path in (copied / "pst900/train").rglob("*_bag2_*.png"):
        path.unlink()
    report = check("pst900", copied)
    assert kinds(report) == ["split"] and report.splits["train"]["usable"] == 4


# measurements


@pytest.mark.parametrize("moved", [(0, 0), (5, -8), (-11, 3)])
def test_a_known_shift_of_thermal_is_measured_to_the_pixel(moved):
    shifts = []
    for index in range(6):
        frame = synthetic.scene(3, "train", index, (120, 160))
        grey = np.asarray(Image.fromarray(frame.rgb).convert("L"))
        shifts.append(misalignment(grey, np.roll(frame.thermal, moved, axis=(0, 1))))
    found = typical(shifts)
    assert found is not None and (found.down, found.right) == moved and found.confidence > CLEAR


def test_pictures_that_do_not_belong_together_have_no_clear_shift():
    frames = [synthetic.scene(3, "train", index, (240, 320)) for index in range(2)]
    noise = np.random.default_rng(0).integers(0, 256, (240, 320), dtype=np.uint8)
    blurred = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)))
    shifts = [misalignment(np.asarray(Image.fromarray(frame.rgb).convert("L")), blurred) for frame in frames]
    assert typical(shifts) is None


def test_a_shifted_split_is_noted(copied):
    for name in names(copied / "mfnet", "train"):
        path = copied / "mfnet" / "images" / f"{name}.png"
        repaint(path, lambda image: np.dstack([image[..., :3], np.roll(image[..., 3], (4, -6), axis=(0, 1))]))
    report = check("mf", copied)
    found = [finding for finding in report.findings if finding.kind == "misaligned"]
    assert [finding.split for finding in found] == ["train"] and report.errors == 0
    assert "4 px below and 6 px left" in found[0].message
    assert report.splits["test"]["shift"]["down"] == 0


def test_grey_levels_are_counted_exactly():
    frame = synthetic.scene(1, "train", 0, SIZE)
    mean, deviation = mean_and_deviation(measure(frame).levels)
    pixels = np.dstack([frame.rgb, frame.thermal]).reshape(-1, 4).astype(float)
    assert mean == pytest.approx(pixels.mean(axis=0)) and deviation == pytest.approx(pixels.std(axis=0))


# the real frames


def test_the_real_mf_folder_gives_what_is_known_of_it(real_data):
    report = check("mf", real_data, threads=2)
    assert report.errors == 0
    found = {kind: [one for one in report.findings if one.kind == kind] for kind in KINDS}
    assert "train 100 of 784, val 30 of 392, test 30 of 393" in found["subset"][0].message
    assert [Path(one.file).stem for one in found["surplus"]] == ["00517D", "00518D", "01115N", "01116N"]
    assert {one.split for one in found["absent class"] if "guardrail" in one.message} == {"val", "test"}
    assert {one.split for one in found["near inside"]} == {"train", "val", "test"}
    assert not found["near across"] and not found["repeated"] and not found["misaligned"]
    train = report.splits["train"]
    assert [round(value, 1) for value in train["mean"]] == [50.4, 57.2, 48.7, 67.1]
    assert train["deviation"] == pytest.approx([53.5, 54.7, 56.7, 32.9], abs=0.06)


# the commands


def test_the_command_tells_by_its_exit_code(copied, tmp_path):
    done = crm("data", "check", "mf", "--data", str(copied), home=tmp_path)
    assert done.returncode == 0 and "0 errors" in done.stdout and done.stdout.count("\n") < 40
    no_label(copied / "mfnet")
    done = crm("data", "check", "mf", "--data", str(copied), "--json", home=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["errors"] == 1
    assert report["findings"][0]["level"] == "error" and report["findings"][0]["kind"] == "missing"
    done = crm("data", "check", "mf", "--data", str(copied / "kp"), home=tmp_path)
    assert done.returncode == 2 and "looks like KP" in done.stderr and "Traceback" not in done.stderr


def test_many_findings_of_a_kind_stay_on_one_screen(copied, tmp_path):
    shutil.rmtree(copied / "mfnet" / "labels")
    (copied / "mfnet" / "labels").mkdir()
    for number in range(60):
        (copied / "mfnet" / "images" / f"more_{number}.png").write_text("")
    done = crm("data", "check", "mf", "--data", str(copied), home=tmp_path)
    assert done.returncode == 1 and done.stdout.count("\n") < 40
    assert "14 errors" in done.stdout and "more (--json lists all)" in done.stdout


@pytest.mark.parametrize("layout", COUNTS)
def test_synthetic_scenes_are_written_checked_and_loaded(layout, tmp_path):
    folder = tmp_path / "set" / layout
    options = ["--size", "96x128", *(f"--{split}={count}" for split, count in COUNTS[layout].items())]
    done = crm("data", "synth", "--layout", layout, *options, str(folder), "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == COUNTS[layout]
    assert [path.name for path in folder.parent.iterdir()] == [layout], "a scratch folder was left behind"
    report = check(layout, folder)
    assert report.errors == 0 and "synthetic" in kinds(report, "note")
    data = override(Config(), {"data.dataset": layout, "data.size": SIZE, "data.crop": (48, 64)}).data
    assert [len(open_run_split(data, split, folder)) > 1 for split in ("train", "val", "test")] == [True] * 3
    assert open_run_split(data, "train", folder)[0].size == SIZE


def test_fewer_frames_than_were_written_are_an_error(tmp_path):
    folder = tmp_path / "mf"
    options = ["--layout", "mf", "--size", "48x64", "--train", "4", "--val", "2", "--test", "2"]
    assert crm("data", "synth", *options, str(folder), home=tmp_path).returncode == 0
    (folder / "train.txt").write_text("\n".join(names(folder, "train")[:3]))
    report = check("mf", folder)
    assert kinds(report) == ["count"] and "3 frames, but 4 were written" in report.findings[0].message


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--layout", "mff", "new"], "Did you mean 'mf'"),
        (["--layout", "mf", "full"], "exists and is no empty folder"),
        (["--layout", "mf", "new", "--size", "480"], "as in 480x640"),
        (["--layout", "mf", "new", "--size", "8x8"], "at least 48x64"),
        (["--layout", "pst900", "new", "--val", "4"], "no val split"),
    ],
)
def test_synth_refuses_in_words_and_leaves_nothing(arguments, hint, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("")
    arguments = [str(tmp_path / part) if part in ("new", "full") else part for part in arguments]
    done = crm("data", "synth", *arguments, home=tmp_path)
    assert done.returncode == 2 and hint in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "kept"]
