"""The three data sets in their real layouts: lists, day and night, the carve-out; synthetic scenes there and back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crm.config import Data
from crm.data.dataset import manifest, open_run_split, open_split, run_splits
from crm.data.export import CLASSES, labels_as, write_synthetic
from crm.data.files import LAYOUTS, locate
from crm.data.specs import DATASETS, CarveOut
from crm.data.transforms import to_input

SIZE = (64, 96)
COUNTS = {"mf": {"train": 6, "val": 2, "test": 4}, "pst900": {"train": 32, "test": 4},
          "kp": {"train": 6, "val": 2, "test": 4}}  # fmt: skip
MF, PST900, KP = (DATASETS[name] for name in ("mf", "pst900", "kp"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Synthetic scenes in all three layouts, as they lie in one data folder."""
    folder = tmp_path_factory.mktemp("data")
    for name, counts in COUNTS.items():
        write_synthetic(name, folder / DATASETS[name].folder, counts=counts, size=SIZE)
    return folder


# written and read


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_synthetic_scenes_come_back_through_the_real_loader(root, dataset):
    spec = DATASETS[dataset]
    for split, count in COUNTS[dataset].items():
        scenes = open_split("synthetic", split, size=SIZE, limit=count)
        back = open_split(dataset, split, data_root=root, size=SIZE, carve_val=False)
        assert len(back) == count
        by_number = (
            sorted(range(count), key=lambda i: i % 2) if dataset == "kp" else range(count)
        )  # kp: day, then night
        for frame, i in zip(back, by_number, strict=True):
            scene = scenes[i]
            assert frame.night == (scene.night and dataset != "pst900")
            assert np.array_equal(frame.label, labels_as(dataset)[scene.label])
            assert frame.label.max() < spec.num_classes or spec.ignore_index in frame.label
            for one, other in ((frame.rgb, scene.rgb), (frame.thermal, scene.thermal)):
                off = np.abs(one.astype(int) - other)
                assert off.max() == 0 if dataset != "kp" else off.mean() < 4
        assert to_input(back[0], spec).image.shape == (1, 4, 64, 96)


@pytest.mark.parametrize("dataset", CLASSES)
def test_every_synthetic_class_has_a_name_there(dataset):
    spec = DATASETS[dataset]
    assert len(CLASSES[dataset]) == len(DATASETS["synthetic"].classes)
    assert all(int(i) < spec.num_classes or int(i) == spec.ignore_index for i in labels_as(dataset))


def test_writing_refuses_a_folder_with_something_in_it_and_a_split_without_files(root, tmp_path):
    with pytest.raises(ValueError, match="is not empty; name a new folder"):
        write_synthetic("mf", root / "mfnet", counts={"train": 2})
    with pytest.raises(ValueError, match="PST900 has no val split on disk; it has train, test"):
        write_synthetic("pst900", tmp_path / "x", counts={"val": 2})
    with pytest.raises(ValueError, match="test needs at least 2 frames"):
        write_synthetic("kp", tmp_path / "x", counts={"test": 1})
    with pytest.raises(ValueError, match="Did you mean 'pst900'"):
        write_synthetic("pst", tmp_path / "x", counts={"test": 2})
    assert not (tmp_path / "x").exists()


def test_writing_that_is_interrupted_leaves_no_list(tmp_path):
    def stop(split: str, done: int, count: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    for dataset in ("mf", "kp"):
        with pytest.raises(KeyboardInterrupt):
            write_synthetic(dataset, tmp_path / dataset, counts={"train": 4}, size=SIZE, tell=stop)
        assert not list((tmp_path / dataset).glob("*.txt"))
        assert not list((tmp_path / dataset).rglob("*.tmp"))


# specs


def test_kp_has_the_train_ids_and_colours_of_cityscapes():
    assert KP.num_classes == KP.ignore_index == 19
    assert (KP.classes[0], KP.classes[11], KP.classes[18]) == ("road", "person", "bicycle")
    assert (KP.colours[0], KP.colours[11], KP.colours[18]) == ((128, 64, 128), (220, 20, 60), (119, 11, 32))


@pytest.mark.parametrize("spec", [MF, KP], ids=lambda spec: spec.name)
def test_day_and_night_splits_are_parts(spec, root):
    whole = open_split(spec.name, "test", data_root=root)
    day, night = (open_split(spec.name, f"test_{time}", data_root=root) for time in ("day", "night"))
    assert sorted(day.names + night.names) == sorted(whole.names)
    assert not any(map(spec.is_night, day.names)) and all(map(spec.is_night, night.names))
    assert (manifest(day)["night"], manifest(night)["day"]) == (0, 0)
    assert spec.splits["test_day"] + spec.splits["test_night"] == spec.splits["test"]


def test_kp_recording_sets_are_by_day_or_by_night():
    times = {f"set{number:02d}_V000_I00050": KP.is_night(f"set{number:02d}_V000_I00050") for number in range(12)}
    assert [name[3:5] for name, night in times.items() if night] == ["03", "04", "05", "09", "10", "11"]


def test_kp_names_are_the_two_lists_together_and_sorted(root, tmp_path):
    split = open_split("kp", "train", data_root=root)
    assert list(split.names) == sorted(split.names) and len(split) == 6
    assert open_split("kp", "train_night", data_root=root).names == split.names[3:]
    folder = tmp_path / "kp"
    (folder / "images" / "set00").mkdir(parents=True)
    (folder / "val_day.txt").write_text("set06_V000_I00453.png\nset06_V000_I00050.png\n")
    (folder / "val_night.txt").write_text("set10_V001_I00050.png\n")  # with .png, as in the released lists
    names = open_split("kp", "val", data_root=tmp_path).names
    assert names == ("set06_V000_I00050", "set06_V000_I00453", "set10_V001_I00050")


def test_pst900_does_not_know_day_from_night(root):
    about = manifest(open_split("pst900", "test", data_root=root))
    assert about["day"] is about["night"] is None


# variants of lists


def test_variants_of_the_mf_list_are_recognised_by_count_and_by_name():
    names = [f"{number:05d}D" for number in range(1568)]
    assert MF.list_variant("train", names[:784]) == "official"
    assert MF.list_variant("train", names[:1176]) == "train and val merged"
    assert MF.list_variant("train", names) == "as long as train with flipped copies"
    flipped = [*names[:784], *(f"{name}_flip" for name in names[:784])]
    assert MF.list_variant("train", flipped) == "784 frames and 784 flipped copies"
    assert MF.list_variant("train", names[:100]) is None
    assert MF.list_variant("test", names[:393]) == "official"
    assert MF.is_night("00702N_flip") and not MF.is_night("00702D_flip")


def test_a_list_with_flipped_copies_is_read_as_listed(root, tmp_path):
    folder = tmp_path / "mfnet"
    scenes = list(open_split("synthetic", "train", size=SIZE, limit=2))
    copies = [replace(frame, name=f"{frame.name}_flip", rgb=frame.rgb[:, ::-1], thermal=frame.thermal[:, ::-1],
                      label=frame.label[:, ::-1]) for frame in scenes]  # fmt: skip
    LAYOUTS["mf"].write({"train": [*scenes, *copies]}, folder)
    split = open_split("mf", "train", data_root=folder, size=SIZE)
    assert split.names[2:] == ("train_00000D_flip", "train_00001N_flip")
    assert np.array_equal(split[3].rgb, split[1].rgb[:, ::-1]) and split[3].night
    assert manifest(split)["list"] == "2 frames and 2 flipped copies"


def test_the_official_lists_are_recognised(real_data):
    for spec, folder in ((MF, "mfnet"), (KP, "kp")):
        lists = real_data / "splits" / folder
        for split, count in spec.splits.items():
            names = LAYOUTS[spec.layout].names(spec, lists, split)
            assert len(names) == count, (spec.name, split)
            assert spec.list_variant(split, names) == "official"


# the carve-out


def test_val_of_pst900_is_whole_recordings_held_out_of_train(root):
    everything = open_split("pst900", "train", data_root=root, size=SIZE, carve_val=False)
    train, val = (open_split("pst900", split, data_root=root, size=SIZE) for split in ("train", "val"))
    assert sorted(train.names + val.names) == sorted(everything.names) and len(val) == 4

    def recordings(names):
        return {name.partition("_rect")[0] for name in names}

    assert not recordings(train.names) & recordings(val.names)
    assert val[0].same_as(everything[everything.names.index(val.names[0])])
    assert manifest(val)["carve_out"] == manifest(train)["carve_out"]
    assert manifest(train)["sha256"] != manifest(everything)["sha256"] and "carve_out" not in manifest(everything)


def test_without_the_carve_out_val_is_refused_and_a_run_has_none(root):
    with pytest.raises(
        ValueError, match=r"PST900 has no val split; data.carve_val=True holds 12.5% of train out as val"
    ):
        open_split("pst900", "val", data_root=root, carve_val=False)
    clean = Data(dataset="pst900", size=SIZE, crop=SIZE, scale=(1.0, 1.0))
    released = replace(clean, carve_val=False)
    assert run_splits(clean) == ("train", "val", "test") and run_splits(released) == ("train", "test")
    assert run_splits(Data(dataset="mf", carve_val=False)) == ("train", "val", "test")
    assert len(open_run_split(released, "train", root)) == 32 and len(open_run_split(clean, "train", root)) == 28
    with pytest.raises(ValueError, match="no val split"):
        open_run_split(released, "val", root)


def real_like(sizes: dict[str, int]) -> list[str]:
    return [f"{name}_rect_rgb_frame{i:010d}" for name, count in sizes.items() for i in range(count)]


def test_the_carve_out_is_fixed_by_the_names_alone():
    assert PST900.carve_out is not None
    names = real_like({f"{31 + i}_bag{1 + i}a": 20 + i for i in range(24)})
    held = PST900.carve_out.held_out(names)
    assert held == PST900.carve_out.held_out(names[::-1])
    assert 1 / 16 < len(held) / len(names) <= 1 / 8
    assert {name.partition("_rect")[0] for name in held} == {"32_bag2a", "46_bag16a", "49_bag19a"}


def test_the_carve_out_takes_the_smallest_recording_if_all_are_large():
    carve = CarveOut(recording=r"[^_]+_[^_]+", share=1 / 8)
    assert len(carve.held_out(real_like({"1_bag1": 50, "2_bag2": 30, "3_bag3": 40}))) == 30
    with pytest.raises(ValueError, match="all frames are of the recording '1_bag1'"):
        carve.held_out(real_like({"1_bag1": 50}))


def test_a_folder_with_one_recording_says_what_to_do(tmp_path):
    scenes = list(open_split("synthetic", "train", size=SIZE, limit=2))
    LAYOUTS["pst900"].write({"train": scenes}, tmp_path / "pst900")  # train_00000D and train_00001N: one prefix
    with pytest.raises(
        ValueError, match=r"all frames are of the recording 'train_'.*data.carve_val=False trains on all"
    ):
        open_split("pst900", "train", data_root=tmp_path)


# manifests and folders


@pytest.mark.parametrize("dataset", ["pst900", "kp"])
def test_the_manifest_changes_with_every_file(root, dataset, tmp_path):
    split = open_split(dataset, "test", data_root=root, size=SIZE)
    assert not isinstance(split.origin, dict)
    first = manifest(split)["sha256"]
    for path in split.origin[1]:
        kept = path.read_bytes()
        path.write_bytes(kept + b"\0")
        assert manifest(open_split(dataset, "test", data_root=root, size=SIZE))["sha256"] != first
        path.write_bytes(kept)
    assert manifest(open_split(dataset, "test", data_root=root, size=SIZE))["sha256"] == first


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_the_folder_itself_is_accepted_too_and_links_are_followed(root, dataset, tmp_path):
    spec = DATASETS[dataset]
    (tmp_path / "link").symlink_to(root / spec.folder)
    assert locate(spec, root) == locate(spec, root / spec.folder) == root / spec.folder
    assert open_split(dataset, "test", data_root=tmp_path / "link", size=SIZE)[0].size == SIZE


# the real frame of PST900


def test_a_real_pst900_frame_reads_as_it_was_published(real_data):
    frame = open_split("pst900", "test", data_root=real_data)[0]
    assert frame.size == (720, 1280) and frame.name == "readme_sample140"
    assert set(np.unique(frame.label)) <= set(range(5)) and len(np.unique(frame.label)) > 1
    assert (frame.thermal == 0).any() and frame.thermal.std() > 5  # holes of the reprojection
