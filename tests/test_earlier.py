"""Frames of the same recording some frames before (T14, T15): in every layout, and in drawn scenes."""

import re
from dataclasses import replace

import numpy as np
import pytest

from crm.conditions import Condition, Degradation
from crm.corruptions import corrupt
from crm.data.dataset import open_split
from crm.data.export import write_synthetic
from crm.data.seen import under
from crm.data.specs import DATASETS, SYNTHETIC

# what is before the last of 14 test frames by 1, 2, 5, 10 and 20: by its number among frames by the same name otherwise
BEFORE = {
    "mf": ("test_00011N", "test_00009N", "test_00003N", "test_00001N", "test_00001N"),
    "kp": tuple(f"set09_V000_I{i:05d}" for i in (11, 9, 3, 1, 1)),
    "pst900": tuple(f"504_bag504_rect_rgb_frame{i:010d}" for i in (12, 12, 12, 12, 12)),
}


@pytest.mark.parametrize("dataset", BEFORE)
def test_a_recording_goes_by_the_numbers_of_the_pictures_that_are_there(dataset, tmp_path):
    spec = DATASETS[dataset]
    splits = ("train", "test")
    folder = write_synthetic(dataset, tmp_path / "data", counts=dict.fromkeys(splits, 14), size=(60, 80))
    split = open_split(dataset, "test", data_root=folder, size=(60, 80))
    last = max(split, key=lambda frame: (frame.night, int(re.findall(r"\d+", frame.name)[-1])))
    others = {frame.name: frame for frame in split}
    for severity, name in enumerate(BEFORE[dataset], 1):
        wanted = others[name]
        for modality, pixels in (("rgb", wanted.rgb), ("thermal", wanted.thermal[..., None])):
            found = corrupt(last, modality, Degradation(kind="time_offset", severity=float(severity)), spec)
            np.testing.assert_array_equal(found, pixels)
    first = corrupt(last, "thermal", Degradation(kind="previous_frame"), spec)
    np.testing.assert_array_equal(first, corrupt(last, "thermal", Degradation(kind="time_offset", severity=1.0), spec))


def test_pictures_without_a_label_are_part_of_a_recording_and_are_resized_as_frames_are(tmp_path):
    """As in a video of which some frames are labelled."""
    folder = write_synthetic("kp", tmp_path / "data", counts={"test": 8}, size=(60, 80))
    listing = folder / "test_day.txt"
    names = listing.read_text().split()
    listing.write_text(names[-1] + "\n")
    (folder / "labels" / f"{names[-2]}.png").unlink()
    whole, small = (open_split("kp", "test_day", data_root=folder, size=size) for size in ((60, 80), (32, 40)))
    assert [frame.name for frame in whole] == [names[-1]] and whole[0].before(1).name == names[-2]
    assert whole[0].before(1).size == (60, 80) and small[0].before(1).size == (32, 40)
    assert whole.only([0])[0].before(1).name == names[-2]


def test_a_drawn_scene_was_farther_away_before_and_its_weather_the_same():
    frame = open_split("synthetic", "test", size=(120, 160), limit=1)[0]
    change = [np.abs(frame.before(k).thermal.astype(int) - frame.thermal).mean() for k in (1, 2, 5, 10, 20)]
    assert change == sorted(change) and change[-1] > 1.3 * change[0]
    things = [(frame.before(k).label > 1).sum() for k in (0, 5, 20)]
    assert things[0] > things[1] > things[2], "what stands on the ground is smaller"
    np.testing.assert_array_equal(frame.before(0).rgb, frame.rgb)
    np.testing.assert_array_equal(frame.before(3).thermal, frame.before(3).thermal)
    assert np.abs(frame.before(20).thermal[:30].astype(int) - frame.thermal[:30]).mean() < 5, "the sky stays"


def test_the_label_stays_where_it_is():
    frame = open_split("synthetic", "test", size=(120, 160), limit=1)[0]
    (view,) = under([frame], SYNTHETIC, Condition(thermal=Degradation(kind="time_offset", severity=5.0)))
    np.testing.assert_array_equal(view.frame.label, frame.label)


def test_a_picture_of_no_recording_has_nothing_before_it():
    frame = replace(open_split("synthetic", "test", size=(120, 160), limit=1)[0], before=None)
    with pytest.raises(ValueError, match="time_offset: test_00000D is of no recording"):
        corrupt(frame, "thermal", Degradation(kind="time_offset", severity=1.0), SYNTHETIC)
