"""Views: pictures of their own for the masked passes (crm.data.views)."""

import numpy as np
import pytest
import torch

from crm.config import Config, override
from crm.corruptions import CORRUPTIONS, apply
from crm.data.dataset import open_run_split
from crm.data.loader import batches, indices, make_batch
from crm.data.transforms import Batch, augment
from crm.data.views import GROUPS, OTHER_SCENES, VIEWS
from crm.randomness import derive
from tests.tiny import TINY

BASE = override(
    TINY,
    {"batch": 4, "data.crop": (48, 64), "data.scale": (0.8, 1.5), "data.flip": 0.5, "data.jitter": 1.0, "seed": 5},
)
SPLIT = open_run_split(BASE.data, "train", None)
OWN = [name for name in VIEWS if name != "clean"]


def config(view: str, **changes) -> Config:
    off = {"loss.complementary": 0.0, "loss.non_local": 0.0} if view in OTHER_SCENES else {}
    return override(BASE, {"masking.view": view, **off, **changes})


def made(view: str, step: int = 0, places: range | None = None, **changes) -> tuple[Batch, Batch]:
    """The clean batch, and the view."""
    batch = make_batch(config(view, **changes), SPLIT, step, places)
    assert batch.view is not None
    return batch, batch.view


def levels(batch: Batch) -> torch.Tensor:
    """Grey levels of a batch, (b, 4, h, w), its padding cut off."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (SPLIT.spec.mean, SPLIT.spec.std))
    height, width = batch.valid[0]
    return (batch.image * std + mean)[..., :height, :width]


def labels(batch: Batch) -> torch.Tensor:
    return batch.label[:, : batch.valid[0][0], : batch.valid[0][1]]


@pytest.mark.parametrize("view", OWN)
def test_a_view_is_a_function_of_seed_step_and_place(view):
    batch, whole = made(view)
    halves = [made(view, places=places)[1] for places in (range(2), range(2, 4))]
    assert torch.equal(torch.cat([half.image for half in halves]), whole.image)
    assert torch.equal(torch.cat([half.label for half in halves]), whole.label)
    assert whole.image.shape == batch.image.shape
    assert torch.equal(made(view)[1].image, whole.image)
    assert not torch.equal(made(view, step=1)[1].image, whole.image)


@pytest.mark.parametrize("view", OWN)
def test_the_clean_input_is_the_same_whatever_the_view(view):
    plain, batch = make_batch(BASE, SPLIT, 0), made(view)[0]
    assert plain.view is None
    assert torch.equal(plain.image, batch.image) and torch.equal(plain.label, batch.label)


@pytest.mark.parametrize("view", OWN)
def test_a_view_differs_from_the_clean_input_in_its_label_if_it_is_another_scene(view):
    steps = [made(view, step) for step in range(3)]
    assert all(not torch.equal(batch.image, other.image) for batch, other in steps)
    assert any(not torch.equal(batch.label, other.label) for batch, other in steps) == (view in OTHER_SCENES)


def test_workers_prepare_views_too():
    asked = config("cutmix", steps=2)
    here, there = (list(batches(asked, SPLIT, 0, workers)) for workers in (0, 1))
    for one, two in zip(here, there, strict=True):
        assert one.view is not None and two.view is not None and torch.equal(one.view.image, two.view.image)


def test_the_second_view_is_another_augmentation_of_the_same_frame():
    _, other = made("second", step=2)
    chosen = indices(5, len(SPLIT), 4, 2, drop_last=False)
    for place in range(4):
        generator = torch.Generator().manual_seed(derive(5, 2, "second view", place))
        image, label = augment(SPLIT[chosen[place]], BASE.data, generator)
        torch.testing.assert_close(levels(other)[place], image.float(), atol=1e-3, rtol=0)
        assert torch.equal(labels(other)[place], label)


def test_cutmix_pastes_one_box_of_another_image_into_both_modalities_and_the_label():
    areas = []
    for step in range(12):
        batch, mixed = made("cutmix", step)
        clean, found = levels(batch), levels(mixed)
        for place in range(4):
            explained = []
            for other in set(range(4)) - {place}:
                own, taken = (found[place] == clean[each] for each in (place, other))
                if not (own | taken).all():
                    continue
                pasted = ~own.all(0)
                rows, columns = (torch.nonzero(pasted.any(axis)).flatten() for axis in (1, 0))
                box = torch.zeros_like(pasted)
                if len(rows):
                    box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
                expected = torch.where(box, labels(batch)[other], labels(batch)[place])
                explained.append(torch.equal(labels(mixed)[place], expected) and bool(taken[:, box].all()))
                areas.append(box.float().mean().item())
            assert any(explained)
    assert min(areas) < 0.15 and max(areas) > 0.5 and 0.2 < np.mean(areas) < 0.5


def test_cross_modal_cutmix_pastes_a_box_into_one_modality_and_leaves_the_label():
    """The other modality is the clean one, bit by bit."""
    pasted_into = []
    for step in range(12):
        batch, mixed = made("cross_cutmix", step)
        clean, found = levels(batch), levels(mixed)
        assert torch.equal(labels(mixed), labels(batch))
        for place in range(4):
            apart = (clean[place] != found[place]).reshape(4, *clean.shape[2:])
            touched = apart[:3].any(), apart[3].any()
            assert not all(touched)
            if not any(touched):
                continue  # the box was outside, or what it holds is the same
            side = slice(0, 3) if touched[0] else slice(3, 4)
            pasted_into.append(bool(touched[0]))
            changed = apart.any(0)
            rows, columns = (torch.nonzero(changed.any(axis)).flatten() for axis in (1, 0))
            box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
            others = set(range(4)) - {place}
            assert any(torch.equal(found[place][side][:, *box], clean[other][side][:, *box]) for other in others)
    assert 0.2 < np.mean(pasted_into) < 0.8


def test_pixel_dropout_takes_up_to_three_quarters_of_the_pixels_and_puts_the_mean_there():
    shares = []
    for step in range(15):
        batch, dropped = made("pixel_dropout", step)
        gone = dropped.image != batch.image
        assert (dropped.image[gone] == 0).all()  # the mean, normalised
        assert torch.equal(batch.label, dropped.label)
        height, width = batch.valid[0]
        inside = gone[..., :height, :width].float()
        shares.append(torch.stack([inside[:, :3].mean((1, 2, 3)), inside[:, 3:].mean((1, 2, 3))]))
    found = torch.cat(shares, dim=1)
    assert found.max() < 0.78 and found.max() > 0.6 and found.min() < 0.1
    assert found.mean().item() == pytest.approx(0.375, abs=0.06)
    assert np.corrcoef(found.numpy())[0, 1] < 0.5  # of each modality its own


@pytest.mark.parametrize("group", GROUPS)
def test_corruptions_of_a_group_exist_at_every_severity(group):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (48, 64, 3)).astype(np.float32)
    for families, channels in zip(GROUPS[group], (3, 1), strict=True):
        assert set(families) <= CORRUPTIONS.keys() and len(families) > 1
        for kind in families:
            for severity in (1.0, 2.0, 3.0, 4.0, 5.0):
                made = apply(pixels[..., :channels], kind, severity, pixels.mean((0, 1))[:channels], rng)
                assert made.shape == (48, 64, channels) and np.isfinite(made).all()


def test_the_groups_share_no_family_so_that_the_others_are_held_out():
    rgb, thermal = ([set(families[side]) for families in GROUPS.values()] for side in (0, 1))
    for groups in (rgb, thermal):
        assert sum(map(len, groups)) == len(set().union(*groups))


def test_each_modality_is_corrupted_in_half_of_the_images():
    changed = []
    for step in range(15):
        batch, other = made("corrupted", step)
        apart = (batch.image - other.image).abs()
        changed.append(torch.stack([(apart[:, :3].amax((1, 2, 3)) > 0), (apart[:, 3:].amax((1, 2, 3)) > 0)]))
        assert torch.equal(batch.label, other.label)
        assert levels(other).min() > -0.01 and levels(other).max() < 255.01
    found = torch.cat(changed, dim=1).float()
    assert found.mean(1).tolist() == pytest.approx([0.5, 0.5], abs=0.2)
    assert (found[0] * found[1]).mean().item() == pytest.approx(0.25, abs=0.17)  # independent of each other


def test_the_group_of_corruptions_is_a_choice():
    noise, blur = (made("corrupted", **{"masking.corruptions": group})[1] for group in ("noise", "blur"))
    assert not torch.equal(noise.image, blur.image)
