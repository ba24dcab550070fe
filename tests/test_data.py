"""Data sets: specs, files in the MF layout, splits, augmentation, batches, contact sheets."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crm.config import Data
from crm.data.dataset import manifest, open_split
from crm.data.files import locate, write_mf
from crm.data.frames import Frame
from crm.data.show import contact_sheet
from crm.data.specs import DATASETS
from crm.data.transforms import augment, collate, jitter, to_input, to_tensors

ROOT = Path(__file__).parents[1]
MF, SYNTHETIC = DATASETS["mf"], DATASETS["synthetic"]
SMALL = (64, 96)
PLAIN = Data(dataset="synthetic", size=SMALL, crop=SMALL, scale=(1.0, 1.0), flip=0.0, jitter=0.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scenes() -> list[Frame]:
    return list(open_split("synthetic", "val", size=SMALL, limit=4))


@pytest.fixture
def written(tmp_path, scenes) -> Path:
    """Synthetic scenes in the MF layout; their ids 0 to 6 are valid MF ids."""
    write_mf({"train": scenes[:3], "test": scenes[3:]}, tmp_path / "mfnet")
    return tmp_path


# specs


@pytest.mark.parametrize("name", DATASETS)
def test_every_spec_can_be_drawn_and_normalised(name):
    spec = DATASETS[name]
    assert spec.name == name
    assert len(spec.classes) == len(spec.colours) == len(set(spec.classes))
    assert all(0 <= part <= 255 for colour in spec.colours for part in colour)


def test_a_spec_needs_a_colour_for_every_class():
    with pytest.raises(ValueError, match="mf: 9 classes but 8 colours"):
        replace(MF, colours=MF.colours[:8])


@pytest.mark.parametrize(
    "module", ["specs", "frames", "synthetic", "pictures", "files", "cache", "dataset", "export", "show"]
)
def test_all_but_transforms_start_without_torch(module):
    check = f"import sys, crm.data.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


# files


def test_what_is_written_in_the_mf_layout_is_read_back_identical(written, scenes):
    back = open_split("mf", "train", data_root=written, size=SMALL)
    assert len(back) == 3
    assert all(frame.same_as(scene) for frame, scene in zip(back, scenes, strict=False))


def test_colours_are_not_weighted_by_temperature(tmp_path):
    frame = Frame(
        name="1D",
        rgb=np.full((8, 8, 3), 200, np.uint8),
        thermal=np.tile(np.arange(8, dtype=np.uint8) * 30, (8, 1)),
        label=np.zeros((8, 8), np.uint8),
        night=False,
    )
    write_mf({"train": [frame]}, tmp_path)
    for size in ((8, 8), (4, 4), (16, 16)):
        assert (open_split("mf", "train", data_root=tmp_path, size=size)[0].rgb == 200).all()


def test_the_data_root_may_be_the_data_set_or_what_holds_it(written):
    assert locate(MF, written) == locate(MF, written / "mfnet") == written / "mfnet"


def test_a_missing_data_set_says_where_it_was_looked_for_and_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked in .*mfnet and .* for images and labels.*https://.*synthetic"):
        open_split("mf", "train", data_root=tmp_path, size=SMALL)
    with pytest.raises(FileNotFoundError, match="--data"):
        open_split("mf", "train", size=SMALL)


# splits


@pytest.mark.parametrize(
    ("dataset", "split", "words"),
    [("sinthetic", "train", "Did you mean 'synthetic'"), ("synthetic", "tran", "Did you mean 'train'")],
)
def test_a_misspelt_name_is_answered_with_the_right_one(dataset, split, words):
    with pytest.raises(ValueError, match=words):
        open_split(dataset, split)


def test_limit_keeps_the_first_frames_and_refuses_more_than_there_are(written):
    assert open_split("mf", "train", data_root=written, size=SMALL, limit=2).names == ("val_00000D", "val_00001N")
    with pytest.raises(ValueError, match="MF train has 3 frames, fewer than the 4 asked for"):
        open_split("mf", "train", data_root=written, size=SMALL, limit=4)


def test_frames_are_decoded_once_and_cannot_be_changed_by_accident(written):
    split = open_split("mf", "train", data_root=written, size=SMALL)
    first = split[0]
    (written / "mfnet" / "images" / "val_00000D.png").unlink()
    assert split[0] is first and split[-3] is first
    with pytest.raises(ValueError, match="read-only"):
        first.rgb[:] = 0
    with pytest.raises(IndexError, match="frames 0 to 2, not 3"):
        split[3]


def test_resizing_keeps_label_ids(written):
    frame = open_split("mf", "train", data_root=written, size=(48, 64))[0]
    whole = open_split("mf", "train", data_root=written, size=SMALL)[0]
    assert frame.rgb.shape == (48, 64, 3) and frame.thermal.shape == frame.label.shape == (48, 64)
    assert set(np.unique(frame.label)) <= set(np.unique(whole.label))


def test_the_manifest_changes_with_any_file_and_any_name(written):
    def digest() -> str:
        return manifest(open_split("mf", "train", data_root=written, size=SMALL))["sha256"]

    first = digest()
    assert first == digest()
    path = written / "mfnet" / "labels" / "val_00002D.png"
    kept = path.read_bytes()
    path.write_bytes(kept + b"\0")
    assert digest() != first
    path.write_bytes(kept)
    assert digest() == first
    (written / "mfnet" / "train.txt").write_text("val_00000D\nval_00001N\n")
    assert digest() != first


def test_the_synthetic_manifest_is_of_the_generator():
    one, other = (manifest(open_split("synthetic", "train", size=SMALL, limit=n)) for n in (4, 6))
    assert (one["count"], one["day"], one["night"]) == (4, 2, 2)
    assert one["sha256"] != other["sha256"]


# augmentation


def marked(height: int = 64, width: int = 96) -> Frame:
    """A frame whose RGB, thermal and label all show the same few rectangles."""
    label = np.zeros((height, width), np.uint8)
    label[10:40, 12:50], label[30:60, 60:80] = 1, 1
    value = label * np.uint8(255)
    return Frame(name="0D", rgb=np.stack([value] * 3, axis=2), thermal=value, label=label, night=False)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**40), low=st.floats(0.75, 1.0), high=st.floats(1.0, 2.0))
def test_rgb_thermal_and_label_share_their_geometry(seed, low, high):
    data = replace(PLAIN, crop=(48, 64), scale=(low, high), flip=0.5)
    image, label = augment(marked(), data, seeded(seed))
    assert image.shape == (4, 48, 64) and label.shape == (48, 64)
    assert all(torch.equal(image[0], image[channel]) for channel in (1, 2, 3))
    assert set(label.unique().tolist()) <= {0, 1}
    assert ((image[0] > 127) == label.bool()).float().mean() > 0.95  # they part at smoothed edges only


@settings(max_examples=15)
@given(seed=st.integers(0, 2**40))
def test_the_same_generator_gives_the_same_augmentation(seed):
    data = replace(PLAIN, crop=(48, 64), scale=(0.8, 1.5), flip=0.5, jitter=1.0)
    first, again = (augment(marked(), data, seeded(seed)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_other_generators_give_other_augmentations(scenes):
    data = replace(PLAIN, crop=(48, 64), scale=(0.8, 1.5), flip=0.5, jitter=1.0)
    images = [augment(scenes[0], data, seeded(seed))[0] for seed in range(8)]
    assert not any(torch.equal(images[0], image) for image in images[1:])


def test_without_scale_crop_flip_and_jitter_nothing_changes(scenes):
    image, label = augment(scenes[0], PLAIN, seeded(0))
    plain_image, plain_label = to_tensors(scenes[0])
    assert torch.equal(image, plain_image) and torch.equal(label, plain_label)


def test_switching_jitter_off_leaves_the_geometry(scenes):
    data = replace(PLAIN, crop=(48, 64), scale=(0.8, 1.5), flip=0.5)
    for seed in range(5):
        labels = [augment(scenes[0], replace(data, jitter=jitter), seeded(seed))[1] for jitter in (0.0, 1.0)]
        assert torch.equal(*labels)


def test_jitter_never_mixes_colours_into_thermal(scenes):
    image, _ = to_tensors(scenes[0])
    draws = [0.0, 0.0, 0.0, 0.0, 0.9, 0.0, 0.9, 0.8, 0.2, 0.9, 0.9, 0.5]  # thermal's contrast does not fire
    changed = jitter(image, 1.0, draws)
    assert torch.equal(changed[3], image[3]) and not torch.equal(changed[:3], image[:3])


def test_jitter_keeps_grey_pictures_grey():
    image = to_tensors(marked())[0]
    for seed in range(10):
        changed = jitter(image, 1.0, torch.rand(12, generator=seeded(seed)).tolist())
        assert (changed[:3].float().std(dim=0) < 2).all()


# batches


def test_a_batch_is_normalised_and_padded_with_zeros_to_multiples_of_32():
    image = torch.full((4, 40, 50), 127, dtype=torch.uint8)
    label = torch.ones(40, 50, dtype=torch.uint8)
    batch = collate([(image, label), (image[:, :30, :20], label[:30, :20])], MF)
    assert batch.image.shape == (2, 4, 64, 64) and batch.valid == [(40, 50), (30, 20)]
    normalised = [(127 - mean) / std for mean, std in zip(MF.mean, MF.std, strict=True)]
    assert batch.image[0, :, 0, 0].tolist() == pytest.approx(normalised)
    assert (batch.image[0, 3, :40, :50] == 0).all()
    for i, (height, width) in enumerate(batch.valid):
        assert (batch.image[i, :, height:] == 0).all() and (batch.image[i, :, :, width:] == 0).all()
        assert (batch.label[i, :height, :width] == 1).all()
        assert (batch.label[i, height:] == 255).all() and (batch.label[i, :, width:] == 255).all()


def test_a_frame_for_evaluation_is_left_as_it_is(scenes):
    batch = to_input(scenes[1], SYNTHETIC)
    assert batch.image.shape == (1, 4, *SMALL) and batch.valid == [SMALL]
    mean, std = (torch.tensor(values)[:, None, None] for values in (SYNTHETIC.mean, SYNTHETIC.std))
    assert torch.equal((batch.image[0] * std + mean).round().to(torch.uint8), to_tensors(scenes[1])[0])


# pictures


def test_a_contact_sheet_shows_day_and_night_side_by_side(written):
    synthetic = contact_sheet(open_split("synthetic", "val", size=SMALL, limit=2))
    from_files = contact_sheet(open_split("mf", "train", data_root=written, size=SMALL), indices=[1])
    assert synthetic.width > 6 * 320 and from_files.width < 4 * 320
    assert len(np.unique(np.asarray(synthetic)[::7, ::7].reshape(-1, 3), axis=0)) > 500


# real frames, where there are any


def test_real_frames_read_as_they_were_published(real_data):
    split = open_split("mf", "test", data_root=real_data)
    frame = split[0]
    assert frame.size == (480, 640) and len(split) == 30
    assert manifest(split)["night"] == 14
    assert max(frame.label.max() for frame in split[:4]) < len(MF.classes)


def test_real_frames_have_the_known_means(real_data):
    split = open_split("mf", "train", data_root=real_data, size=(60, 80))
    pixels = np.concatenate([np.dstack([frame.rgb, frame.thermal]).reshape(-1, 4) for frame in split[::5]])
    assert np.abs(pixels.mean(axis=0) - (50.4, 57.2, 48.7, 67.1)).max() < 6
