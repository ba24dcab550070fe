"""Masks of every type and shape: what they hide, how much of it, and that they are a function of their seed."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crm.config import Config, Masking, override
from crm.masking import FILLS, MASKINGS, SHAPES, TOKEN, draw_masks, training_masks

GRID = (16, 20)  # tokens
SEEDS = st.integers(0, 2**31)
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
PATCHES = st.integers(1, 16).map(lambda n: TOKEN * n)
RATIOS = st.floats(0, 1)
few = settings(max_examples=30)  # of each type and shape


def masks(kind="complementary", shape="patch", batch=6, tokens=GRID, ratio=0.5, patch=16, drop=0.25, seed=0, **more):
    return draw_masks(kind, shape, batch, tokens, ratio, patch, drop, torch.Generator().manual_seed(seed), **more)


def cells(hidden: torch.Tensor, patch: int) -> torch.Tensor:
    """The first token of every patch."""
    return hidden[..., :: patch // TOKEN, :: patch // TOKEN]


# ---------------------------------------------------------------------------------------------- every type and shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MASKINGS)
@few
@given(ratio=RATIOS, patch=PATCHES, tokens=SIZES, seed=SEEDS)
def test_every_masking_is_a_function_of_its_seed_and_spares_the_padding(kind, shape, ratio, patch, tokens, seed):
    how = {"ratio": ratio, "patch": patch, "tokens": tokens, "seed": seed}
    hidden = masks(kind, shape, **how)
    assert hidden.dtype == torch.bool and hidden.shape == (6, 2, *tokens)
    assert torch.equal(hidden, masks(kind, shape, **how))
    height, width = (-(-side // 2) for side in tokens)
    padded = masks(kind, shape, **how, valid=(height, width))
    assert not padded[..., height:, :].any() and not padded[..., width:].any()


@pytest.mark.parametrize("shape", SHAPES)
@given(ratio=RATIOS, patch=PATCHES, tokens=SIZES, seed=SEEDS)
def test_complementary_masks_never_hide_a_token_in_both(shape, ratio, patch, tokens, seed):
    how = {"shape": shape, "ratio": ratio, "patch": patch, "tokens": tokens, "seed": seed}
    rgb, thermal = masks("complementary", **how).unbind(1)
    assert torch.equal(rgb, ~thermal)
    rgb, thermal = masks("random_complementary", **how).unbind(1)
    assert not (rgb & thermal).any()


@pytest.mark.parametrize("shape", ["patch", "gaussian"])
@given(ratio=RATIOS, patch=PATCHES, tokens=SIZES, seed=SEEDS)
def test_shapes_of_patches_hide_whole_patches_as_many_as_the_ratio_says(shape, ratio, patch, tokens, seed):
    rgb = masks("rgb_only", shape, ratio=ratio, patch=patch, tokens=tokens, seed=seed)[:, 0]
    first = cells(rgb, patch)
    assert (first.flatten(1).sum(1) == math.ceil(ratio * first[0].numel())).all()
    whole = np.kron(first.numpy(), np.ones((1, patch // TOKEN, patch // TOKEN), bool))
    assert np.array_equal(rgb.numpy(), whole[:, : tokens[0], : tokens[1]])


@given(ratio=RATIOS, tokens=SIZES, seed=SEEDS)
def test_a_square_is_one_box_inside_the_image_with_the_area_of_the_ratio(ratio, tokens, seed):
    for rgb in masks("rgb_only", "square", ratio=ratio, tokens=tokens, seed=seed)[:, 0]:
        rows, columns = rgb.any(1), rgb.any(0)
        assert torch.equal(rgb, rows[:, None] & columns)
        for inside, side in zip((rows, columns), tokens, strict=True):
            assert inside.sum() == 0 or inside.sum() == round(side * math.sqrt(ratio))
            assert (inside.int().diff() == 1).sum() <= 1  # without a gap


@pytest.mark.parametrize("kind", ["individual", "identical", "rgb_only"])
def test_how_the_masks_of_the_modalities_depend_on_each_other(kind):
    rgb, thermal = masks(kind, batch=200).unbind(1)
    assert rgb.float().mean() == pytest.approx(0.5)
    if kind == "individual":  # independent: half of what one hides is hidden by the other
        assert (rgb & thermal).float().mean() == pytest.approx(0.25, abs=0.02)
    else:
        assert torch.equal(thermal, rgb if kind == "identical" else torch.zeros_like(rgb))


def test_modality_dropout_never_takes_both():
    dropped = masks("modality_dropout", batch=4000, drop=0.3).flatten(2)
    assert torch.equal(dropped.any(2), dropped.all(2))
    rgb, thermal = dropped.all(2).unbind(1)
    assert not (rgb & thermal).any()
    for one in (rgb, thermal):
        assert one.float().mean() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("kind", [name for name in MASKINGS if name != "none"])
def test_an_image_is_masked_whole_or_not_at_all_with_the_probability(kind):
    always, half = masks(kind, batch=2000), masks(kind, batch=2000, probability=0.5)
    kept = (always == half).flatten(1).all(1)
    assert torch.equal(half[~kept], torch.zeros_like(half[~kept]))
    masked = always.flatten(1).any(1)
    assert (half.flatten(1).any(1).sum() / masked.sum()).item() == pytest.approx(0.5, abs=0.05)
    assert not masks(kind, batch=20, probability=0.0).any()


# ---------------------------------------------------------------------------------------------- Gaussian


def spread(hidden: torch.Tensor) -> float:
    """Mean squared distance of hidden tokens from their centre."""
    distances = []
    for one in hidden:
        places = one.nonzero().float()
        distances.append((places - places.mean(0)).square().sum(1).mean())
    return torch.stack(distances).mean().item()


def test_a_gaussian_mask_gathers_in_one_region_and_no_region_is_preferred():
    uniform, gathered = (masks("rgb_only", shape, 400, (20, 20), 0.2, 4)[:, 0] for shape in ("patch", "gaussian"))
    assert spread(gathered) < 0.6 * spread(uniform)
    often = gathered.float().mean(0)
    assert often[5:15, 5:15].mean() < 1.6 * often.mean()  # the middle is hidden somewhat more often than the border
    assert often.min() > 0.25 * often.mean()


def test_a_gaussian_mask_draws_patches_by_weight():
    """One patch of each image: how often it lies within one deviation of the centre, against the density itself."""
    drawn = masks("rgb_only", "gaussian", 4000, (40, 40), 1 / 1600, 4, seed=3)[:, 0]
    # the same centres, drawn before anything else from the same generator
    generator = torch.Generator().manual_seed(3)
    torch.rand(4000, generator=generator)
    centre = torch.rand(4000, 2, 1, generator=generator)[..., 0]
    found = (drawn.flatten(1).int().argmax(1)[:, None] // torch.tensor([40, 1]) % 40 + 0.5) / 40
    inner = ((centre > 0.4) & (centre < 0.6)).all(1)  # whose density the border hardly cuts
    away = ((found - centre) / 0.25)[inner].square().sum(1).sqrt()
    grid = (np.arange(40) + 0.5) / 40
    distance = np.hypot(*np.meshgrid((grid - 0.5) / 0.25, (grid - 0.5) / 0.25))
    weight = np.exp(-(distance**2) / 2)
    expected = weight[distance < 1].sum() / weight.sum()
    assert (away < 1).float().mean().item() == pytest.approx(expected, abs=0.12)


# ---------------------------------------------------------------------------------------------- overlap


@pytest.mark.parametrize("shape", ["patch", "gaussian"])
@given(ratio=RATIOS, overlap=st.floats(0, 1), patch=PATCHES, tokens=SIZES, seed=SEEDS)
def test_the_overlap_is_the_share_of_hidden_patches_that_both_hide(shape, ratio, overlap, patch, tokens, seed):
    rgb, thermal = cells(
        masks("complementary", shape, ratio=ratio, patch=patch, tokens=tokens, seed=seed, overlap=overlap), patch
    ).unbind(1)
    hidden, seen = (group.flatten(1).sum(1) for group in (rgb, ~rgb))
    both, neither = ((a & b).flatten(1).sum(1) for a, b in ((rgb, thermal), (~rgb, ~thermal)))
    assert torch.equal(both, (overlap * hidden + 0.5).floor().long())
    assert torch.equal(neither, (overlap * seen + 0.5).floor().long())


def test_overlap_goes_from_complementary_to_identical_at_equal_amounts():
    shares = []
    for overlap in (0.0, 0.25, 0.5, 0.75, 1.0):
        hidden = masks(overlap=overlap, seed=5)
        rgb, thermal = hidden.unbind(1)
        assert rgb.float().mean() == thermal.float().mean() == 0.5
        assert torch.equal(rgb, masks(seed=5)[:, 0])  # the same patches of RGB all along
        shares.append((rgb & thermal).float().mean().item())
    assert shares == pytest.approx([0, 0.125, 0.25, 0.375, 0.5], abs=0.03)
    assert shares[0] == 0 and shares[-1] == 0.5


def test_a_third_of_overlapping_random_complementary_masks_overlap():
    rgb, thermal = masks("random_complementary", batch=3000, overlap=1.0).unbind(1)
    both = (rgb & thermal).flatten(1).any(1)
    assert both.float().mean().item() == pytest.approx(1 / 3, abs=0.04)
    assert torch.equal(rgb[both], thermal[both])


# ---------------------------------------------------------------------------------------------- fills, a step's masks


@pytest.mark.parametrize("fill", FILLS)
def test_a_fill_changes_hidden_tokens_alone(fill):
    image = torch.randn(3, 4, 64, 80) + 5
    hidden = masks("individual", batch=3)
    seen, tokens = FILLS[fill](image, hidden)
    pixels = np.kron(hidden.numpy(), np.ones((1, 1, TOKEN, TOKEN), bool))[:, [0, 0, 0, 1]]
    if fill == "token":
        assert seen is image and tokens is hidden
    else:
        assert tokens is None
        assert np.array_equal(seen.numpy(), np.where(pixels, 0, image.numpy()))


def test_a_steps_masks_are_those_of_its_seed_and_number():
    config = Config(masking=Masking(kind="individual"))
    size = (256, 320)
    first = training_masks(config, size, 3)
    assert first is not None and torch.equal(first, training_masks(config, size, 3))
    assert not torch.equal(first, training_masks(config, size, 4))
    assert not torch.equal(first, training_masks(override(config, {"seed": 1}), size, 3))
    assert not first[:, :, 60:].any()  # 240 rows and 16 of padding


# ---------------------------------------------------------------------------------------------- refused

OFF = {f"loss.{name}": 0.0 for name in ("masked", "complementary", "non_local")}
REFUSED = {
    "a fill that does not exist": ({"masking.fill": "men"}, "no masking.fill 'men'. Did you mean 'mean'?"),
    "a view that does not exist": ({"masking.view": "cutmx"}, "Did you mean 'cutmix'?"),
    "corruptions that do not exist": ({"masking.corruptions": "nose"}, "Did you mean 'noise'?"),
    "an overlap above 1": ({"masking.overlap": 1.5}, "masking.overlap must be between 0 and 1"),
    "a probability above 1": ({"masking.probability": 2.0}, "masking.probability must be between 0 and 1"),
    "an overlap of independent masks": (
        {"masking.kind": "individual", "masking.overlap": 0.5}, "masking.overlap is of complementary masks",
    ),
    "an overlap of boxes": (
        {"masking.shape": "square", "masking.overlap": 0.5}, "masking.shape 'square'; masking.kind 'identical'",
    ),
    "masked terms without a masked input": (
        {"masking.kind": "none"}, "masking.kind is 'none', so loss.masked must be 0",
    ),
    "a view that nothing looks at": (
        {**OFF, "masking.view": "second"}, "masking.view is 'second', but nothing looks at it: loss.masked",
    ),
    "distillation between two scenes": (
        {"masking.view": "cutmix"}, "masking.view is 'cutmix', so loss.complementary must be 0: it is another scene",
    ),
    "cross-modal cutmix of one image": ({"masking.view": "cross_cutmix", "batch": 1}, "'cross_cutmix' mixes two"),
    "a temperature of a form without distributions": (
        {"loss.temperature": 2.0}, "is of loss.distillation 'kl', and loss.distillation is 'l1_logits'",
    ),
    "a temperature of nothing": (
        {"loss.temperature": 2.0, "loss.distillation": "kl", "loss.complementary": 0.0, "loss.non_local": 0.0},
        "is of loss.distillation 'kl', and loss.complementary and loss.non_local are 0",
    ),
    "a temperature of 0": (
        {"loss.temperature": 0.0, "loss.distillation": "kl"}, "loss.temperature must be above 0",
    ),
    "cutmix of one image": ({**OFF, "loss.masked": 1.0, "masking.view": "cutmix", "batch": 1}, "batch is 1"),
    "a teacher without its average": ({"loss.teacher": "ema"}, "optim.ema must be above 0, as in 0.99"),
    "a teacher that does not exist": ({"loss.teacher": "evl"}, "Did you mean 'eval'?"),
    "a form that does not exist": ({"loss.distillation": "l1"}, "no loss.distillation 'l1'."),
    "nothing supervised": (
        {f"loss.{name}": 0.0 for name in ("fused", "rgb", "thermal", "masked")}, "loss.thermal_masked must be above 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        override(Config(), changes)


def test_an_unknown_masking_or_shape_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"no masking 'complementry'\. Did you mean 'complementary'"):
        masks("complementry")
    with pytest.raises(ValueError, match="no mask shape 'box'"):
        masks(shape="box")
