"""`crm data show`: the pictures are what the network gets, and every sheet says what its colours mean."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crm import evaluate
from crm.conditions import SUITES, Condition, condition
from crm.config import Config, override
from crm.data import seen
from crm.data.dataset import Split, open_split
from crm.data.loader import indices, make_batch
from crm.data.show import DRAWN, HEAD, MARGIN, WIDTH, View, as_recorded, contact_sheet
from crm.data.specs import DATASETS, DatasetSpec
from crm.recipes import RECIPES
from experiments.synthetic_small import config as small
from tests.test_cli import crm

ROOT = Path(__file__).parents[1]
SYNTHETIC = DATASETS["synthetic"]
SIZE = (64, 96)
CROPS = {"data.size": SIZE, "data.crop": (40, 56), "data.scale": (0.8, 1.5), "data.jitter": 1.0, "batch": 4}
FIRST = (slice(HEAD, HEAD + DRAWN[0]), slice(MARGIN, MARGIN + WIDTH))  # the first picture on a sheet


@pytest.fixture(scope="module")
def scenes() -> Split:
    return open_split("synthetic", "train", size=SIZE, limit=4)


def levels(image: torch.Tensor, spec: DatasetSpec) -> np.ndarray:
    """Normalised (b, 4, h, w) as grey levels (b, h, w, 4)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    return (image * std + mean).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


# as the network sees it


@pytest.mark.parametrize("how", SUITES["robustness"], ids=lambda how: how.name)
def test_under_a_condition_the_pictures_are_the_network_input(how: Condition, scenes):
    frames = list(scenes)
    views = seen.under(frames, SYNTHETIC, how)
    for modality, degradation, channels in (("rgb", how.rgb, slice(0, 3)), ("thermal", how.thermal, slice(3, 4))):
        image, _ = evaluate.modality_input(SYNTHETIC, frames, modality, degradation, 0)
        shown = np.stack([np.dstack([view.frame.rgb, view.frame.thermal]) for view in views])
        assert np.array_equal(shown[..., channels], levels(image, SYNTHETIC)[..., channels])


@pytest.mark.parametrize("kind", ["missing_token", "missing_route"])
def test_a_modality_that_does_not_reach_the_network_is_shown_hidden(kind, scenes):
    view = seen.under([scenes[0]], SYNTHETIC, condition(f"test.thermal={kind}"))[0]
    assert view.hidden is not None
    assert not view.hidden[0].any() and view.hidden[1].all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_augmented_frames_are_the_first_batch_of_training(recipe, scenes):
    config = RECIPES[recipe](override(small, {**CROPS, "seed": 3}))
    batch = make_batch(config, scenes, 0)
    order = indices(config.seed, len(scenes), config.batch, 0, config.data.drop_last)
    views = seen.in_training([scenes[i] for i in order], SYNTHETIC, config, augmented=True, masked=False)
    shown = np.stack([np.dstack([view.frame.rgb, view.frame.thermal]) for view in views])
    assert np.array_equal(shown, levels(batch.image, SYNTHETIC))
    assert np.array_equal(np.stack([view.frame.label for view in views]), batch.label.numpy())
    assert all(view.padded and view.hidden is None for view in views)


@pytest.mark.parametrize("recipe", RECIPES)
def test_masks_end_at_the_padding_or_cover_it_as_the_recipe_says(recipe, scenes):
    # a crop of 32x48 in 32x64: the grid has 2x3 patches of 16 pixels, or 2x4 with the padding; half of them are hidden
    changes = {**CROPS, "data.crop": (32, 48), "masking.kind": "complementary", "masking.patch": 16}
    config = RECIPES[recipe](override(small, changes))
    views = seen.in_training(list(scenes), SYNTHETIC, config, augmented=True, masked=True)
    for view in views:
        assert view.hidden is not None and view.hidden.shape == (2, 32, 64)
        assert view.hidden[:, :, 48:].any() == (recipe == "released")
        grid = view.hidden[:, ::16, ::16] if recipe == "released" else view.hidden[:, ::16, :48:16]
        assert grid[0].sum() == grid[0].size / 2 and np.array_equal(grid[0], ~grid[1])


def test_another_seed_is_another_picture_and_the_same_seed_the_same(scenes):
    def shown(seed: int) -> np.ndarray:
        config = override(small, {**CROPS, "seed": seed})
        view = seen.in_training([scenes[0]], SYNTHETIC, config, augmented=True, masked=True)[0]
        assert view.hidden is not None
        return np.concatenate([view.frame.rgb.ravel(), view.hidden.ravel()])

    assert np.array_equal(shown(1), shown(1)) and not np.array_equal(shown(1), shown(2))


def test_masks_without_augmentation_lie_on_the_whole_frame(scenes):
    config = override(small, {"data.size": SIZE, "masking.kind": "complementary"})
    view = seen.in_training([scenes[1]], SYNTHETIC, config, augmented=False, masked=True)[0]
    assert np.array_equal(view.frame.rgb, scenes[1].rgb) and not view.padded
    assert view.hidden is not None and np.array_equal(view.hidden[0], ~view.hidden[1])


# the sheet


def swatches(sheet: Image.Image) -> set[tuple[int, ...]]:
    """The colours of the legend, which stands in the last lines."""
    values = np.asarray(sheet)[-130:, MARGIN:-MARGIN]
    return {tuple(colour) for colour in np.unique(values.reshape(-1, 3), axis=0)}


@pytest.mark.parametrize("name", DATASETS)
def test_the_legend_has_a_swatch_for_every_class(name, scenes):
    spec = DATASETS[name]
    frame = replace(scenes[0], label=np.zeros(SIZE, np.uint8))
    split = Split(spec, "test", [frame.name], SIZE, lambda i: frame, [])
    assert swatches(contact_sheet(split, indices=[0])) >= set(spec.colours)


def test_what_is_hidden_is_hatched_and_explained(scenes):
    hidden = np.zeros((2, *SIZE), dtype=bool)
    hidden[0, :32] = True

    def view(frames):
        return [View(frame, hidden) for frame in frames]

    sheet = np.asarray(contact_sheet(scenes, indices=[0], view=view))
    height = round(WIDTH * SIZE[0] / SIZE[1])
    top, below = sheet[FIRST][: height // 2 - 2], sheet[FIRST][height // 2 + 2 : height]
    assert len(np.unique(top.reshape(-1, 3), axis=0)) == 2 and len(np.unique(below.reshape(-1, 3), axis=0)) > 50
    plain = contact_sheet(scenes, indices=[0], view=lambda frames: [View(frame) for frame in frames])
    assert sheet.shape[0] >= plain.height


def test_ignored_pixels_have_a_colour_no_class_has(scenes):
    for spec in DATASETS.values():
        label = np.full(SIZE, spec.ignore_index, np.uint8)
        frame = replace(scenes[0], label=label)
        split = Split(spec, "test", [frame.name], SIZE, lambda i, frame=frame: frame, [])
        sheet = np.asarray(contact_sheet(split, indices=[0], view=lambda frames: as_recorded(frames)))
        drawn = tuple(sheet[HEAD + 20, MARGIN + 2 * (WIDTH + 8) + 20])
        assert drawn not in spec.colours


def test_a_wide_frame_keeps_its_shape(scenes):
    frame = replace(scenes[0], **{part: getattr(scenes[0], part)[:32] for part in ("rgb", "thermal", "label")})
    split = Split(DATASETS["pst900"], "test", [frame.name], (32, 96), lambda i: frame, [])
    tall = Split(DATASETS["pst900"], "test", [frame.name], SIZE, lambda i: scenes[0], [])
    more = contact_sheet(tall, indices=[0]).height - contact_sheet(split, indices=[0]).height
    assert more == round(WIDTH * 64 / 96) - round(WIDTH * 32 / 96)


def test_a_split_without_frames_of_the_night_has_one_column():
    day = open_split("synthetic", "test", size=SIZE, limit=1)
    assert contact_sheet(day).width < 4 * WIDTH


@pytest.mark.parametrize("module", ["check", "findings", "measure", "show"])
def test_looking_at_data_needs_no_torch(module):
    code = f"import sys, crm.data.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# the command


def test_the_command_shows_the_frames_that_were_named_in_their_order(tmp_path):
    names = "test_00005N,test_00002D"
    done = crm("data", "show", "synthetic", "--names", names, "--out", str(tmp_path / "a.png"), "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == names.split(",")
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 6 * WIDTH


def test_training_is_shown_on_train(tmp_path):
    options = ["--augmented", "--masked", "--rows", "1", "--set", "masking.patch=32"]
    done = crm("data", "show", "synthetic", *options, "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["split"] == "train" and shown["file"] == str(tmp_path / "reports" / "synthetic.png")
    assert Path(shown["file"]).is_file()


WRONG = {
    "a condition that does not exist": (["--under", "test.rgb=missing_maen"], "Did you mean 'missing_mean'"),
    "a condition and training": (["--under", "test", "--masked"], "choose one"),
    "a condition of another split": (["--under", "val", "--split", "test"], "is about the split val"),
    "a frame that is not there": (["--names", "test_0001D"], "most like it are test_0001"),
    "an experiment on other data": (["--masked", "--experiment", "mf_small"], "an experiment on mf, not on synthetic"),
    "a seed of nothing": (["--seed", "1"], "--augmented"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_options_are_answered_with_what_would_be_right(what, tmp_path):
    arguments, hint = WRONG[what]
    done = crm("data", "show", "synthetic", *arguments, home=tmp_path)
    assert done.returncode == 2 and hint in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_experiment_can_be_shown(scenes):
    from crm.cli import options

    for name in options.modules("experiments"):
        config: Config = options.find_experiment(name)
        crop = {"data.size": SIZE, "data.crop": (32, 48), "data.scale": (0.8, 1.2)}
        spec = DATASETS[config.data.dataset]
        views = seen.in_training([scenes[0]], spec, override(config, crop), augmented=True, masked=True)
        assert views[0].frame.size == (32, 64)
