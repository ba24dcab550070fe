"""The synthetic road scenes: repeatable, of both times of day, and each modality blind where it should be."""

from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from crm.data.dataset import open_split
from crm.data.specs import DATASETS
from crm.data.synthetic import CONE, PERSON, VENT, VERSION, compose, render, scene

SPEC = DATASETS["synthetic"]
SMALL = (64, 96)
# of scenes at version 1; a change of pixels raises synthetic.VERSION and replaces these
GOLDEN = {0: "46bfdfe0db1d5032", 1: "cbd1e092c6ac325a"}


@pytest.fixture(scope="module")
def frames():
    return {split: list(open_split("synthetic", split, size=SMALL, limit=30)) for split in ("train", "test")}


def around(mask: np.ndarray, reach: int = 2) -> np.ndarray:
    """Pixels within `reach` of the mask, outside it."""
    grown = mask.copy()
    for _ in range(reach):
        padded = np.pad(grown, 1)
        grown = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown & ~mask


def contrast(picture: np.ndarray, label: np.ndarray, kind: int) -> float | None:
    """Difference of the mean grey of a class and of what surrounds it, 0..255; None if it hardly shows."""
    mask = label == kind
    if mask.sum() < 20:
        return None
    grey = picture.mean(axis=2) if picture.ndim == 3 else picture.astype(float)
    return abs(grey[mask].mean() - grey[around(mask)].mean())


def test_a_scene_is_the_same_every_time():
    assert scene(3, "train", 5, SMALL).same_as(scene(3, "train", 5, SMALL))


@pytest.mark.parametrize("other", [(4, "train", 5), (3, "test", 5), (3, "train", 7)])
def test_seed_split_and_index_each_change_the_scene(other):
    assert not np.array_equal(scene(3, "train", 5, SMALL).label, scene(*other, SMALL).label)


@pytest.mark.parametrize("index", GOLDEN)
def test_pixels_do_not_change_unless_the_version_does(index):
    frame = scene(SPEC.seed, "test", index, SMALL)
    digest = sha256(frame.rgb.tobytes() + frame.thermal.tobytes() + frame.label.tobytes()).hexdigest()
    assert (VERSION, digest[:16]) == (1, GOLDEN[index])


@pytest.mark.parametrize("index", range(4))
def test_a_scene_is_laid_out_alike_at_every_size(index):
    small, large = (scene(1, "val", index, size).label for size in (SMALL, (192, 288)))
    assert (small == large[1::3, 1::3]).mean() > 0.97


def test_scenes_too_small_to_show_anything_are_refused():
    with pytest.raises(ValueError, match="at least 48x64 pixels, not 32x96"):
        scene(0, "train", 0, (32, 96))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_class_occurs_often(split, frames):
    counts = np.zeros(len(SPEC.classes))
    for frame in frames[split]:
        counts += np.bincount(frame.label.ravel(), minlength=len(SPEC.classes)) >= 20
    assert (counts >= 0.15 * len(frames[split])).all(), dict(zip(SPEC.classes, counts, strict=True))


def test_half_the_scenes_are_at_night_and_their_names_say_so(frames):
    assert sum(frame.night for frame in frames["test"]) == len(frames["test"]) / 2
    assert all(SPEC.is_night(frame.name) == frame.night for frame in frames["test"])


def test_night_hides_people_from_rgb_and_not_from_thermal(frames):
    night = [frame for frame in frames["train"] + frames["test"] if frame.night]
    rgb = [contrast(frame.rgb, frame.label, PERSON) for frame in night]
    thermal = [contrast(frame.thermal, frame.label, PERSON) for frame in night]
    shown = [i for i, value in enumerate(rgb) if value is not None]
    assert len(shown) > 20
    assert np.median([rgb[i] for i in shown]) < 0.2 * np.median([thermal[i] for i in shown])


def test_thermal_crossover_hides_people_from_thermal():
    plans = [(index, compose(SPEC.seed, "train", index)) for index in range(0, 40, 2)]
    found = {False: [], True: []}
    for index, plan in plans:
        frame = scene(SPEC.seed, "train", index, SMALL)
        value = contrast(frame.thermal, frame.label, PERSON)
        if value is not None:
            found[plan.crossover].append(value)
    assert np.median(found[True]) < 0.4 * np.median(found[False])


@pytest.mark.parametrize("night", [0, 1])
def test_rgb_sees_no_vent_and_thermal_sees_no_cone(night):
    vents = cones = 0
    for index in range(night, 20, 2):
        plan = compose(SPEC.seed, "train", index)
        no_cones = replace(plan, things=tuple(thing for thing in plan.things if thing.kind != "cone"))
        rgb, heat, label = render(plan, *SMALL)
        blind_rgb, cold, _ = render(replace(plan, vents=()), *SMALL)
        bare_rgb, blind_heat, _ = render(no_cones, *SMALL)
        assert np.array_equal(rgb, blind_rgb)  # without its vents a scene looks the same in RGB
        assert np.array_equal(heat, blind_heat)  # and without its cones in thermal
        if (mask := label == VENT).sum() >= 10:
            vents += 1
            assert (heat - cold)[mask].mean() > 0.2
        if (mask := label == CONE).sum() >= 10:
            cones += 1
            assert np.abs(rgb - bare_rgb).sum(axis=0)[mask].mean() > 0.2
    assert vents >= 3 and cones >= 3
