"""Masks and metrics against those of the released code."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch

from crm.confusion import confusion_matrix, iou, miou
from crm.masking import draw_masks, released_patches

KINDS = {"comp": "complementary", "rand_comp": "random_complementary", "indiv": "individual"}
PARTS = ["patch", "square"]


def load(folder, name: str) -> dict:
    if not (folder / name).is_file():
        pytest.skip(f"no {name} in {folder}")
    if name.endswith(".json"):
        return json.loads((folder / name).read_text())
    with np.load(folder / name) as stored:
        return dict(stored)


def drawn(kind: str, size: list[int], patch: int, ratio: float, batch: int, seed: int = 0) -> torch.Tensor:
    tokens = (size[0] // 4, size[1] // 4)
    generator = torch.Generator().manual_seed(seed)
    return draw_masks(KINDS[kind], "patch", batch, tokens, ratio, patch, 0.0, generator)


# ------------------------------------------------------------------------------------- masks


def test_patch_masks_hide_as_many_tokens_as_the_released_ones(golden):
    """For every size, patch, ratio and strategy: the counts that occur, what both hide, and what either hides."""
    for row in load(golden, "masks.json")["patch"]:
        if "error" in row:  # a patch that does not divide the image: ours is cut at the edge
            continue
        masks = drawn(row["strategy"], row["size"], row["patch"], row["ratio"], 60)
        assert list(masks.shape[2:]) == row["shape"][1:]
        assert math.prod(row["shape"]) == row["tokens"]
        counts = {tuple(pair) for pair in masks.flatten(2).sum(2).tolist()}
        assert counts == {tuple(pair) for pair in row["distinct_(rgb,thr)_masked_token_counts"]}, row
        overlap, union = (found.flatten(1).sum(1) for found in (masks[:, 0] & masks[:, 1], masks[:, 0] | masks[:, 1]))
        if row["strategy"] != "indiv":
            assert [overlap.min().item(), overlap.max().item()] == row["overlap_tokens_min_max"], row
            assert [union.min().item(), union.max().item()] == row["union_tokens_min_max"], row
        else:  # of random draws only what must be: each hides the count, so overlap and union add up to twice that
            assert (overlap + union == masks.flatten(2).sum(2).sum(1)).all()


def test_every_patch_is_hidden_whole_and_they_are_as_many(golden):
    for row in load(golden, "masks.json")["patch"]:
        if "error" in row or row["strategy"] == "rand_comp":
            continue
        side = row["patch"] // 4
        rgb = drawn(row["strategy"], row["size"], row["patch"], row["ratio"], 3)[:, 0]
        cells = rgb.unfold(1, side, side).unfold(2, side, side).flatten(3).float().mean(3)
        assert set(cells.unique().tolist()) <= {0.0, 1.0}
        assert (cells.flatten(1).sum(1) == row["mask_count_patches"]).all()
        assert cells[0].numel() == row["patches"]


def test_the_three_forms_of_random_complementary_masks_are_equally_frequent(golden):
    recorded = load(golden, "masks.json")["rand_comp_cases_of_30000"]
    masks = drawn("rand_comp", [32, 64], 32, 0.5, 30_000)
    rgb, thermal = masks.flatten(2).any(2).unbind(1)
    ours = {
        "only_thermal_masked": (thermal & ~rgb).sum().item(),
        "only_rgb_masked": (rgb & ~thermal).sum().item(),
        "both": (rgb & thermal).sum().item(),
    }
    spread = 5 * math.sqrt(2 * 30_000 * (1 / 3) * (2 / 3))  # five deviations of the difference of two such counts
    for form, number in recorded.items():
        assert abs(ours[form] - number) < spread


def test_seeded_masks_equal_the_released_draws(golden):
    stored = load(golden, "masks_seeded.npz")
    wanted: dict[tuple[str, int], dict[int, np.ndarray]] = {}
    for name, masks in stored.items():
        found = re.fullmatch(r"patch\.(\w+)\.seed(\d+)\.(\d+)", name)
        assert found, name
        wanted.setdefault((found[1], int(found[2])), {})[int(found[3])] = masks
    for (strategy, seed), draws in wanted.items():
        tokens = draws[0].shape[2:]
        cells, choice = np.random.RandomState(seed), random.Random(seed)
        for k in sorted(draws):
            ours = released_patches(KINDS[strategy], tokens, 0.5, 32, cells, choice)
            assert torch.equal(ours, torch.from_numpy(draws[k][:, 0]).bool()), (strategy, seed, k)


def test_the_released_square_masks_could_not_run(golden):
    """Pixels instead of tokens, and area ratio squared: ours hides the ratio, in tokens."""
    recorded = load(golden, "masks.json")
    assert "size of tensor" in recorded["square_through_backbone"]
    for row in recorded["square"]:
        height, width = row["size"]
        masks = draw_masks(
            "complementary", "square", 50, (height // 4, width // 4), row["ratio"], 32, 0.0, torch.Generator()
        )
        assert row["shape"][1:] == row["size"]
        share = masks[:, 0].float().mean().item()
        assert share == pytest.approx(row["ratio"], abs=0.02)
        if row["strategy"] == "comp":
            assert row["rgb_masked_min_mean_max"][2] / row["pixels"] <= row["ratio"] ** 2 + 1e-2


# ------------------------------------------------------------------------------------- metrics


def test_confusion_matrices_and_metrics_equal_the_released_ones(golden):
    tensors, described = load(golden, "metrics.npz"), load(golden, "metrics.json")
    pairs = [name for name in described if f"{name}.label" in tensors and "error" not in described[name]]
    assert pairs
    totals: dict[str, np.ndarray] = {}
    for name in pairs:
        label, prediction, about = tensors[f"{name}.label"], tensors[f"{name}.pred"], described[name]
        # the released code leaves out whatever is no class, whichever its number
        label = np.where(label < about["classes"], label, about["ignore"])
        matrix = confusion_matrix(label, prediction, about["classes"], about["ignore"])
        np.testing.assert_array_equal(matrix, tensors[f"{name}.conf"])
        assert matrix.sum() == about["counted_pixels"]
        check_metrics(matrix, {key: tensors[f"{name}.{key}"] for key in ("precision", "recall", "iou")}, about)
        group = name.partition(".")[0]
        totals[group] = totals.get(group, 0) + matrix
    for group, matrix in totals.items():
        about = described[f"{group}.total"]
        np.testing.assert_array_equal(matrix, tensors[f"{group}.total.conf"])
        check_metrics(matrix, {key: tensors[f"{group}.total.{key}"] for key in ("precision", "recall", "iou")}, about)


def check_metrics(matrix: np.ndarray, wanted: dict[str, np.ndarray], about: dict) -> None:
    """Ours are in per cent, and NaN for a class that does not occur, which the released code counts as 0."""
    hit, rows, columns = np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    ours = {
        "precision": hit / np.maximum(columns, 1),
        "recall": hit / np.maximum(rows, 1),
        "iou": np.nan_to_num(iou(matrix)) / 100,
    }
    for key, values in ours.items():
        np.testing.assert_allclose(values, wanted[key], rtol=1e-12, atol=0)
        assert values.mean() == pytest.approx(about[f"mean_{key}"], rel=1e-12)
    present = (rows + columns) > 0
    assert miou(matrix) == pytest.approx(100 * wanted["iou"][present].mean())


def test_an_image_without_a_counted_pixel_counts_nothing(golden):
    """The released code stops there: scikit-learn finds none of the classes."""
    tensors, described = load(golden, "metrics.npz"), load(golden, "metrics.json")
    for name, about in described.items():
        if isinstance(about, dict) and "error" in about:
            label, prediction = tensors[f"{name}.label"], tensors[f"{name}.pred"]
            assert not confusion_matrix(label, prediction, about["classes"], about["ignore"]).any()
