"""The nine published settings under both recipes: `released` does what the released code does, `clean` does not.

Each quirk is tested by what it changes in a run, not by the setting that switches it.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.published import published
from crm.cli.options import find_experiment, modules
from crm.cli.runs import selections
from crm.config import Config, override
from crm.confusion import iou, miou, released_miou
from crm.data.dataset import open_split
from crm.data.frames import Frame
from crm.data.loader import indices
from crm.data.specs import DATASETS
from crm.data.transforms import augment
from crm.machine import Machine
from crm.masking import training_masks
from crm.model.segmenter import build_segmenter
from crm.optim import build_optimizer, rate
from crm.points import OUTSIDE, RandomPoints
from crm.recipes import QUIRKS, RECIPES, released
from crm.set_losses import set_losses
from crm.sweep import refuse_selection
from crm.targets import Targets, make_targets
from crm.train import _scored

EXPERIMENTS = [f"{data}_swin_{size}" for data in ("mf", "pst900", "kp") for size in "tsb"]
TRAIN_IMAGES = {"mf": 784, "pst900": 597, "kp": 499}  # what the released code trains on
PARAMETERS = {"mf_swin_t": 74_924_094, "mf_swin_s": 117_559_902, "mf_swin_b": 193_495_610}  # of the released code

each = pytest.mark.parametrize("name", EXPERIMENTS)


def config(name: str, recipe: str) -> Config:
    return find_experiment(name, recipe)


@each
def test_it_is_there_with_its_published_result(name):
    assert name in modules("experiments")
    result = published()[name]
    assert 50 < result.miou < 90 and "test split" in result.selection and "README" in result.source


def test_every_published_result_belongs_to_an_experiment():
    assert sorted(published()) == sorted(EXPERIMENTS)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_the_networks_have_as_many_parameters_as_the_released_ones(name, count):
    made = config(name, "clean")
    with torch.device("meta"):
        network = build_segmenter(made.model, DATASETS[made.data.dataset].num_classes)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@each
def test_the_recipes_differ_in_the_listed_settings_alone(name):
    clean = config(name, "clean")
    settings = {path: value for quirk in QUIRKS.values() for path, value in quirk.settings.items()}
    expected = override(clean, {**settings, "model.init": config(name, "released").model.init})
    assert config(name, "released") == expected
    assert RECIPES["clean"](clean) == clean


# ---------------------------------------------------------------------------------------------- quirk by quirk


@each
def test_1_the_released_recipe_trains_on_all_of_train_and_chooses_on_test(name):
    clean, as_released = (config(name, recipe) for recipe in ("clean", "released"))
    assert selections(as_released) == (["last", "test_best"] if "pst900" in name else ["last", "val_best", "test_best"])
    assert selections(clean) == ["last", "val_best"]
    if "pst900" in name:
        with pytest.raises(ValueError, match="no val split"):
            refuse_selection("val_best", as_released)
    with pytest.raises(ValueError, match="test_best=True"):
        refuse_selection("test_best", clean)


def test_2_the_choice_on_test_leaves_out_the_incomplete_batch():
    """MF 392 of 393 images, KP 300 of 311, PST900 288 of 288."""
    for data, (images, kept) in {"mf": (393, 392), "kp": (311, 300), "pst900": (288, 288)}.items():
        made = config(f"{data}_swin_t", "released")
        split = open_split("synthetic", "test", limit=images)
        assert len(_scored("test_best", split, made.batch)) == kept
        assert len(_scored("val_best", split, made.batch)) == images


def test_4_both_recipes_compute_in_float32_unless_the_machine_is_told_otherwise():
    assert Machine(runs=Path("nowhere")).precision == "fp32"
    assert "precision" in Machine(runs=Path("nowhere")).numerics()


def frame() -> Frame:
    """A frame of MF's size whose colours are saturated, so that broken saturation shows."""
    rows, columns = np.mgrid[0:480, 0:640]
    rgb = np.stack([columns % 256, 255 - columns % 256, rows % 256], axis=2).astype(np.uint8)
    thermal, label = (rows % 200).astype(np.uint8), (columns // 80).astype(np.uint8)
    return Frame(name="00001D", rgb=rgb, thermal=thermal, label=label, night=False)


def test_5_released_jitter_turns_images_grey_and_clean_jitter_does_not():
    """A grey image is one whose colour channels agree; a quarter or so of the released ones are broken."""
    grey = dict.fromkeys(RECIPES, 0)
    for recipe in RECIPES:
        made = override(config("mf_swin_t", recipe), {"data.scale": (1.0, 1.0), "data.crop": (64, 64)})
        for seed in range(120):
            image, _ = augment(frame(), made.data, torch.Generator().manual_seed(seed))
            low, high = image[:3].amin(0).float(), image[:3].amax(0).float()
            grey[recipe] += ((high - low) / high.clamp(min=1)).median().item() < 0.02
    assert grey["clean"] == 0 and grey["released"] >= 6


def test_6_released_frames_are_resized_without_antialias():
    """A fine pattern of stripes shrunk to half: antialias gives their mean, plain bilinear sampling keeps contrast."""
    stripes = replace(frame(), thermal=np.tile(np.array([0, 0, 250], np.uint8), (480, 214))[:, :640])
    spread = {}
    for recipe in RECIPES:
        part = {"data.scale": (0.5, 0.5), "data.jitter": 0.0, "data.crop": (240, 320)}
        made = override(config("mf_swin_t", recipe), part)
        image, _ = augment(stripes, made.data, torch.Generator().manual_seed(0))
        spread[recipe] = image[3].float().std().item()
    assert spread["released"] > 1.3 * spread["clean"]


@each
def test_3_the_schedule_hardly_decays_as_released_and_reaches_zero_when_clean(name):
    last = {}
    for recipe in RECIPES:
        made = config(name, recipe)
        epoch = TRAIN_IMAGES[made.data.dataset] // made.batch
        last[recipe] = rate(made.steps - 1, made.steps, epoch, made.optim)
        assert rate(0, made.steps, epoch, made.optim) == 1.0
    assert last["released"] == pytest.approx({"mf": 0.984, "kp": 0.978, "pst900": 0.982}[name.split("_")[0]], abs=5e-4)
    assert last["clean"] < 1e-4


def test_3_the_released_rate_moves_once_per_epoch():
    made = config("mf_swin_t", "released")
    rates = [rate(step, made.steps, 56, made.optim) for step in range(120)]
    assert len(set(rates[:56])) == len(set(rates[56:112])) == 1
    assert rates[56] == pytest.approx((1 - 1 / 35_000) ** 0.9)


def masks(made: Config, steps: int = 12) -> torch.Tensor:
    """The masks of some steps, (n, 2, h, w), for the padded crop."""
    height, width = (-(-side // 32) * 32 for side in made.data.crop)
    return torch.cat([training_masks(made, (height, width), step) for step in range(steps)])


@pytest.mark.parametrize("patch", [4, 8, 16, 32])
def test_9_released_masks_cover_the_padded_rows_and_clean_ones_do_not(patch):
    """MF: a crop of 240 rows, padded to 256, so token rows 60 to 63 are padding."""
    covered = {}
    for recipe in RECIPES:
        made = override(config("mf_swin_t", recipe), {"masking.patch": patch, "masking.kind": "complementary"})
        hidden = masks(made, 3)
        covered[recipe] = hidden[:, :, 60:].float().mean().item()
        inside = hidden[:, :, :60] if recipe == "clean" else hidden
        assert (inside.sum(1) == 1).all()  # every token there in exactly one modality
    assert covered["released"] == pytest.approx(0.5, abs=0.2) and covered["clean"] == 0


def test_9_the_released_grid_must_divide_the_padded_crop():
    with pytest.raises(ValueError, match="does not divide the padded crop"):
        override(config("pst900_swin_t", "released"), {"masking.patch": 64})
    assert masks(override(config("pst900_swin_t", "clean"), {"masking.patch": 64}), 1).any()


def test_8_a_square_mask_is_refused_as_released_and_has_the_wanted_area_when_clean():
    square = {"masking.shape": "square", "masking.kind": "individual"}
    with pytest.raises(ValueError, match="released code cannot train"):
        override(config("mf_swin_t", "released"), square)
    hidden = masks(override(config("mf_swin_t", "clean"), square))[:, :, :60]
    assert hidden.float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_11_the_masked_input_is_supervised_with_weight_1_as_released():
    halved = override(config("mf_swin_t", "clean"), {"loss.masked": 0.5})
    assert RECIPES["clean"](halved).loss.masked == 0.5
    assert released(halved).loss.masked == 1.0


@pytest.mark.parametrize(("quirk", "kind"), [(14, "padded"), (15, "ignored")])
def test_14_15_padded_and_ignored_pixels_are_negatives_as_released_and_nothing_when_clean(quirk, kind):
    """Two predictions that differ only where pixels are padded or ignored."""
    labels = torch.zeros(1, 32, 64, dtype=torch.uint8)
    labels[:, :, 16:32] = 1
    spec = DATASETS["kp"]
    if kind == "ignored":
        labels[:, :, 32:] = spec.ignore_index
    targets = make_targets(labels, 3, spec.ignore_index, valid=[(32, 32)] if kind == "padded" else None)
    assert QUIRKS[quirk].settings
    for recipe in RECIPES:
        loss = replace(config("kp_swin_t", recipe).loss, points=256)
        outside, nothing = (losses(targets, loss, there) for there in (8.0, -8.0))
        assert (outside > nothing + 0.1) is (recipe == "released"), (recipe, outside, nothing)


def losses(targets: Targets, loss, there: float) -> float:
    """Mask and dice loss of masks that are right on the left half and say `there` on the right."""
    from crm.model.query_decoder import Prediction

    masks = torch.full((1, 1, 2, 8, 16), -8.0)
    masks[..., 0, :, :4] = masks[..., 1, :, 4:8] = 8.0
    masks[..., 8:] = there
    masks[..., 7:9] = 0.0  # what lies between is read from both sides
    classes = torch.zeros(1, 1, 2, 4)
    classes[..., 0, 0] = classes[..., 1, 1] = 5.0
    found = set_losses(Prediction(classes, masks), ["fused"], targets, loss, RandomPoints(torch.Generator()))
    return (found.masks + found.dice).sum().item()


def test_outside_is_no_class():
    assert max(spec.num_classes for spec in DATASETS.values()) < OUTSIDE


def test_16_17_both_rules_for_absent_classes_are_reported_and_class_0_counts():
    matrix = torch.tensor([[8, 2, 0], [0, 5, 0], [0, 0, 0]]).numpy()
    values = iou(matrix)
    assert math.isnan(values[2])
    assert released_miou(matrix) == pytest.approx((values[0] + values[1]) / 3)
    assert miou(matrix) == pytest.approx((values[0] + values[1]) / 2)


@each
def test_18_kp_with_swin_b_alone_starts_from_22k_as_released(name):
    assert "22k" not in config(name, "clean").model.init
    assert ("22k" in config(name, "released").model.init) is (name == "kp_swin_b")


@pytest.mark.parametrize("name", ["mf_swin_t", "pst900_swin_t", "kp_swin_t"])
def test_20_released_epochs_are_whole_batches_and_norms_are_per_process(name):
    for recipe in RECIPES:
        made = config(name, recipe)
        images = TRAIN_IMAGES[made.data.dataset]
        epoch = images // made.batch
        seen = [i for step in range(epoch) for i in indices(0, images, made.batch, step, made.data.drop_last)]
        following = indices(0, images, made.batch, epoch, made.data.drop_last)
        if recipe == "released":
            assert following == indices(0, images, made.batch, epoch, True)
            assert sorted(seen) != list(range(images)) or images % made.batch == 0
        else:
            rest = images - len(seen)
            assert sorted(seen + following[:rest]) == list(range(images))
        with torch.device("meta"):
            norms = build_segmenter(made.model, 9).backbone.fusion_norms
        assert all(norm.sync is (recipe == "clean") for norm in norms)


@each
def test_21_the_released_seed_is_1024(name):
    assert config(name, "released").seed == 1024 and config(name, "clean").seed == 0


@each
def test_what_both_recipes_keep(name):
    """Quirks 7, 13, 22: masks, the rate of the fusion norms, the clip."""
    for recipe in RECIPES:
        made = config(name, recipe)
        assert (made.masking.kind, made.masking.patch, made.masking.ratio) == ("random_complementary", 32, 0.5)
        assert (made.optim.lr, made.optim.clip, made.optim.weight_decay) == (1e-4, 0.01, 0.05)
        assert made.steps == 35_000 and made.model.fusion == "max" and made.model.drop_path == 0.3
    with torch.device("meta"):
        network = build_segmenter(made.model, 9)
    slow = {
        id(p)
        for group in build_optimizer(network, made.optim).param_groups
        if group["lr"] < 5e-5
        for p in group["params"]
    }
    assert all(id(parameter) in slow for parameter in network.backbone.fusion_norms.parameters())


def test_a_recipe_that_does_not_exist_names_those_that_do():
    with pytest.raises(ValueError, match="Did you mean 'released'"):
        find_experiment("mf_swin_t", "relased")
