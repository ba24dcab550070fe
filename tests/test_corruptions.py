"""Corruptions: what all of them promise, and each against its published parameters or an independent calculation."""

import inspect
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import crm.corruptions
from crm.conditions import DEGRADATIONS, IN_THE_NETWORK, SEVERE, Degradation
from crm.corruptions import (
    AS_THEY_ARE,
    CORRUPTIONS,
    FROZEN,
    OBJECTS,
    TOGETHER,
    VERSION,
    apply,
    corrupt,
    generator,
    hidden_tokens,
    meaning,
    moved_label,
)
from crm.corruptions.parts import disk, streak
from crm.data.dataset import open_split
from crm.data.specs import SYNTHETIC

SPLIT = open_split("synthetic", "test", size=(120, 160), limit=4)
LEVELS = (1.0, 2.0, 3.0, 4.0, 5.0)
EXAMPLES = {"SHARES": (0.1, 0.5, 0.9), "AMOUNTS": (10.0, 50.0), "THREE": LEVELS[:3], "LEVELS": LEVELS}
UNORDERED = ("snow", "fog", "agc")  # whose severities differ in kind as well as in size


def severities(kind: str) -> tuple[float, ...]:
    return EXAMPLES.get(DEGRADATIONS[kind], (0.0,))


def seen(kind: str, severity: float, index: int = 0, side: str = "thermal", seed: int = 0) -> np.ndarray:
    return corrupt(SPLIT[index], side, Degradation(kind=kind, severity=severity), SYNTHETIC, seed)


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def grey(value: float = 100.0, size: tuple[int, int] = (480, 640), channels: int = 1) -> np.ndarray:
    return np.full((*size, channels), value, np.float32)


def done(kind: str, severity: float, pixels: np.ndarray, mean: float = 0.0) -> np.ndarray:
    return apply(pixels, kind, severity, np.full(pixels.shape[2], mean, np.float32), rng())


# ---------------------------------------------------------------------------------------------- what all promise


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_corruption_repeats_changes_nothing_it_is_given_and_stays_in_range(kind):
    for side, raw in (("rgb", SPLIT[0].rgb), ("thermal", SPLIT[0].thermal[..., None])):
        before = raw.copy()
        for severity in severities(kind):
            first, again = (seen(kind, severity, side=side) for _ in range(2))
            assert first.shape == raw.shape and first.dtype == np.float32
            np.testing.assert_array_equal(first, again)
            if kind != "nm":  # which is not clipped, as published
                assert first.min() >= 0 and first.max() <= 255
            if kind not in AS_THEY_ARE:
                np.testing.assert_array_equal(first, np.rint(first))
        np.testing.assert_array_equal(raw, before)


@pytest.mark.parametrize("kind", [kind for kind in CORRUPTIONS if kind in SEVERE])
def test_severity_0_is_the_identity(kind):
    pixels = SPLIT[0].rgb.astype(np.float32)
    np.testing.assert_array_equal(apply(pixels, kind, 0.0, np.zeros(3, np.float32), rng()), pixels)


@pytest.mark.parametrize("kind", [kind for kind in SEVERE if kind not in (*IN_THE_NETWORK, *UNORDERED)])
def test_with_the_same_draws_a_greater_severity_changes_more(kind, monkeypatch):
    monkeypatch.setattr(crm.corruptions, "generator", lambda *about: rng())
    clean = SPLIT[0].thermal[..., None].astype(float)
    change = [np.abs(seen(kind, severity) - clean).mean() for severity in severities(kind)]
    assert all(worse > 0.98 * better for better, worse in pairwise(change)), change
    assert change[-1] > 1.2 * change[0]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_what_is_drawn_differs_between_images_modalities_severities_and_seeds_as_stated(kind):
    first, *others = severities(kind)

    def draws(*about, severity: float = first) -> float:
        return float(generator(Degradation(kind=kind, severity=severity), *about).random())

    assert (draws("a", "rgb") == draws("b", "rgb")) is (kind in FROZEN)
    assert (draws("a", "rgb") == draws("a", "thermal")) is (kind in TOGETHER)
    assert draws("a", "rgb") != draws("a", "rgb", 1)
    assert draws("a", "rgb") not in [draws("a", "rgb", severity=other) for other in others]


# of one picture at severity 3; a change of pixels raises corruptions.VERSION and replaces these
GOLDEN = {
    "impulse_noise": "350df081ef3b95d6", "netd_noise": "25c815a54277cc24", "column_noise": "2412dc62edf9a072",
    "stripes": "caf135c2c609693f", "dead_pixels": "8f712a74eb8b2bcb", "dead_lines": "299f421d24328336",
    "shift": "83420e4a82cb2fc6", "snow": "4d987cdd71dc447c", "halo": "4dbcdf981ab86a84",
    "glare": "6459996d28384db2", "time_offset": "195377ed4a52fc39", "rotation": "67d58ea1ccc9ebd0",
}  # fmt: skip


@pytest.mark.parametrize("kind", GOLDEN)
def test_the_pixels_are_those_of_every_other_machine(kind):
    digest = sha256(seen(kind, 3.0).astype(np.uint8).tobytes()).hexdigest()
    assert (VERSION, digest[:16]) == (2, GOLDEN[kind])


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_corruption_says_what_it_does(kind):
    assert 20 < len(meaning(kind)) < 130 and "\n" not in meaning(kind)
    assert inspect.isfunction(CORRUPTIONS[kind])


def test_a_name_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"no corruption 'fogg'. Did you mean 'fog'"):
        apply(grey(), "fogg", 1.0, np.zeros(1), rng())


# ---------------------------------------------------------------------------------------------- published parameters


@pytest.mark.parametrize(("severity", "sd"), list(enumerate((0.08, 0.12, 0.18, 0.26, 0.38), 1)))
def test_gaussian_noise_has_the_standard_deviation_of_imagenet_c(severity, sd):
    noise = done("gaussian_noise_c", float(severity), grey(127)) - 127
    assert np.median(np.abs(noise)) / 0.67449 == pytest.approx(255 * sd, rel=0.03)  # clipping leaves the median alone


@pytest.mark.parametrize(("severity", "photons"), list(enumerate((60, 25, 12, 5, 3), 1)))
def test_shot_noise_has_the_variance_of_counted_photons(severity, photons):
    counts = done("shot_noise", float(severity), grey(51)) * photons / 255
    assert counts.mean() == pytest.approx(0.2 * photons, rel=0.02)
    assert counts.var() == pytest.approx(0.2 * photons, rel=0.04)


@pytest.mark.parametrize(("severity", "share"), list(enumerate((0.03, 0.06, 0.09, 0.17, 0.27), 1)))
def test_impulses_strike_the_published_share_half_black_half_white(severity, share):
    struck = done("impulse_noise", float(severity), grey(100, channels=3))
    assert (struck == 0).mean() == pytest.approx(share / 2, rel=0.03)
    assert (struck == 255).mean() == pytest.approx(share / 2, rel=0.03)


def test_speckle_is_in_proportion_to_the_pixel():
    for value in (20, 60):
        assert done("speckle_noise", 2.0, grey(value)).std() == pytest.approx(0.2 * value, rel=0.03)


@pytest.mark.parametrize(("severity", "sigma"), list(enumerate((1, 2, 3, 4, 6), 1)))
def test_gaussian_blur_has_the_published_sd_at_640_pixels_and_half_at_320(severity, sigma):
    for width, scale in ((640, 1.0), (320, 0.5)):
        pixels = np.random.default_rng(0).uniform(0, 255, (48, width, 1)).astype(np.float32)
        wanted = gaussian_filter(pixels[..., 0].astype(float), scale * sigma, mode="nearest")
        assert np.abs(done("gaussian_blur", float(severity), pixels)[..., 0] - wanted).max() <= 0.51


@pytest.mark.parametrize("radius", [3, 4, 6, 8, 10])
def test_a_defocused_point_is_a_disk_of_the_published_radius(radius):
    kernel = disk(radius)
    reach = len(kernel) // 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    assert kernel.sum() == pytest.approx(1)
    assert (kernel * (x**2 + y**2)).sum() == pytest.approx(radius**2 / 2 + 1 / 6, rel=0.02)  # of a disk, and of pixels


def test_motion_smears_along_a_line():
    kernel = streak(21, 3, 1.0, 30.0)
    y, x = np.nonzero(kernel)
    reach = len(kernel) // 2
    assert kernel.sum() == pytest.approx(1)
    slope = np.polyfit(x - reach, y - reach, 1)[0]
    assert slope == pytest.approx(np.tan(np.deg2rad(30)), abs=0.05)
    assert kernel[reach, reach] == pytest.approx(1 / np.exp(-(np.arange(21) ** 2) / 18).sum())
    np.testing.assert_array_equal(streak(21, 3, 1.0, 0.0)[20] > 0, np.arange(41) >= 20)


@pytest.mark.parametrize(("severity", "gain"), list(enumerate((0.4, 0.3, 0.2, 0.1, 0.05), 1)))
def test_contrast_keeps_the_mean_and_the_published_gain(severity, gain):
    pixels = np.random.default_rng(0).uniform(0, 255, (90, 120, 3)).astype(np.float32)
    changed = done("contrast", float(severity), pixels)
    assert changed.std() == pytest.approx(gain * pixels.std(), rel=0.03)
    assert changed.mean() == pytest.approx(pixels.mean(), abs=0.2)


def test_brightness_is_added_to_the_value_and_keeps_hue_and_saturation():
    pixels = np.zeros((2, 2, 3), np.float32) + np.array([120, 60, 30], np.float32)
    brighter = done("brightness", 2.0, pixels)[0, 0]
    assert brighter[0] == pytest.approx(120 + 51)
    np.testing.assert_allclose(brighter / brighter[0], [1, 0.5, 0.25], atol=0.01)
    assert (done("brightness", 1.0, grey(0, (2, 2), 3)) == 26).all(), "black has no hue"
    assert (done("brightness", 5.0, grey(200, (2, 2))) == 255).all()


def test_pixelate_leaves_as_many_pixels_as_published():
    pixels = np.random.default_rng(0).uniform(0, 255, (480, 640, 1)).astype(np.float32)
    coarse = done("pixelate", 5.0, pixels)[..., 0]
    np.testing.assert_array_equal(coarse[::4, ::4].repeat(4, 0).repeat(4, 1), coarse)
    assert coarse[0, 0] == pytest.approx(pixels[:4, :4].mean(), abs=1)


def test_low_light_counts_photons_of_a_darkened_picture():
    counts = done("low_light", 1.0, grey(204)) * 60 / 255
    assert counts.mean() == pytest.approx(60 * 0.6 * 0.8**1.2, rel=0.01)
    assert done("over_exposure", 2.0, grey(90))[0, 0, 0] == 180


# ---------------------------------------------------------------------------------------------- EMM, RMM, NM


def test_rmm_drops_elements_of_pixels_and_channels_alike():
    pixels = np.random.default_rng(0).uniform(1, 255, (300, 400, 3)).astype(np.float32)
    for share in (0.25, 0.5, 0.75):
        dropped = done("element_dropout", share, pixels, mean=77.5) == 77.5
        assert dropped.mean() == pytest.approx(share, abs=0.01)
        assert dropped.all(axis=2).mean() == pytest.approx(share**3, abs=0.01), "channels are dropped independently"


@pytest.mark.parametrize(("level", "density", "sd"), [(1, 0.05, 0.1), (2, 0.1, 0.2), (3, 0.2, 0.5)])
def test_nm_has_the_published_density_and_noise_in_normalised_units(level, density, sd):
    pixels = np.full((400, 500, 1), 0.3, np.float32)
    pixels[0, 0], pixels[0, 1] = -20, 20  # extremes far from the rest
    noisy = CORRUPTIONS["nm"](pixels, np.zeros(1), float(level), rng())
    struck = np.abs(noisy) > 10
    once = 1 - (1 - 1 / pixels.size) ** (density / 2 * pixels.size)  # places are drawn with replacement
    assert (noisy < -10).mean() == pytest.approx(once, rel=0.03)
    assert struck.mean() == pytest.approx(once + once * (1 - once), rel=0.03), "pepper falls on some of the salt"
    assert (noisy[~struck] - 0.3).std() == pytest.approx(sd, rel=0.01)


def test_nm_is_in_units_of_the_network():
    """With sd of 0.1 in normalised units, the noise has a tenth of the data set's standard deviation."""
    for side, std in (("rgb", SYNTHETIC.std[0]), ("thermal", SYNTHETIC.std[3])):
        raw = SPLIT[0].rgb[..., :1] if side == "rgb" else SPLIT[0].thermal[..., None]
        change = (seen("nm", 1.0, side=side)[..., :1] - raw).ravel()
        middle = np.quantile(np.abs(change), 0.68)
        assert middle == pytest.approx(0.1 * std, rel=0.15)


# ---------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("size", [(64, 96), (112, 144)])
def test_complementary_dropout_loses_every_patch_in_exactly_one_modality(share, size):
    split = open_split("synthetic", "test", size=size, limit=1)
    mean = np.array(SYNTHETIC.mean, np.float32)
    hidden = {}
    for side, kind, how in (("rgb", "common_dropout", share), ("thermal", "rest_dropout", round(1 - share, 9))):
        pixels = corrupt(split[0], side, Degradation(kind=kind, severity=how), SYNTHETIC)
        hidden[side] = (pixels == (mean[:3] if side == "rgb" else mean[3:])).all(axis=2)
    patch = {
        side: np.stack([where[y::16, x::16] for y in (0, 3) for x in (0, 3)]).all(0) for side, where in hidden.items()
    }
    assert (patch["rgb"] ^ patch["thermal"]).mean() > 0.99  # a patch of the mean's own grey level may be there


def test_common_dropout_loses_the_same_places_in_both():
    lost = {}
    for side, mean in (("rgb", SYNTHETIC.mean[:3]), ("thermal", SYNTHETIC.mean[3:])):
        lost[side] = (seen("common_dropout", 0.5, side=side) == np.array(mean, np.float32)).all(axis=2)
    assert (lost["rgb"] == lost["thermal"]).mean() > 0.98


def test_blocks_hide_whole_tokens_and_the_same_places_whatever_takes_their_place():
    how = Degradation(kind="block_dropout_token", severity=0.5)
    tokens = hidden_tokens([SPLIT[0]], "thermal", how, 0, (128, 160))
    assert tokens is not None and tokens.shape == (1, 32, 40)
    pixels = tokens[0].repeat(4, 0).repeat(4, 1)[:120]
    zeroed = seen("block_dropout_zero", 0.5)[..., 0] == 0
    assert (zeroed >= pixels).all() and zeroed.mean() - pixels.mean() < 0.02
    assert not tokens[0, 30:].any(), "the padding is not hidden"


# ---------------------------------------------------------------------------------------------- thermal, geometry


@pytest.mark.parametrize(
    ("kind", "sds"),
    [("netd_noise", (4, 8, 12, 18, 26)), ("column_noise", (3, 6, 10, 15, 22))],
)
def test_thermal_noise_has_the_sizes_of_the_table(kind, sds):
    for severity, sd in enumerate(sds, 1):
        assert (done(kind, float(severity), grey(128)) - 128).std() == pytest.approx(sd, rel=0.12)
    noise = done("column_noise", 3.0, grey(128))
    np.testing.assert_array_equal(noise[0], noise[-1])


def test_fixed_pattern_noise_is_the_same_in_all_frames():
    for kind in FROZEN:
        flat = [
            apply(
                grey(size=(8, 9)),
                kind,
                5.0,
                np.zeros(1),
                generator(Degradation(kind=kind, severity=5.0), name, "thermal"),
            )
            for name in "ab"
        ]
        np.testing.assert_array_equal(*flat)


@pytest.mark.parametrize(("severity", "share", "offset"), [(1, 0.05, 10), (5, 0.3, 60)])
def test_stripes_are_whole_lines_of_the_stated_share_and_offset(severity, share, offset):
    change = done("stripes", float(severity), grey(100))[..., 0] - 100
    line = change[0] if (change == change[0]).all() else change[:, 0]
    assert set(np.unique(line).tolist()) == {-offset, 0, offset}
    assert (line != 0).mean() == pytest.approx(share, abs=0.003)


def test_dead_pixels_and_lines_are_as_many_as_stated():
    broken = done("dead_pixels", 5.0, grey(100))[..., 0] != 100
    assert broken.mean() == pytest.approx(0.05, rel=0.05)
    squares = broken[:-1, :-1] & broken[1:, :-1] & broken[:-1, 1:] & broken[1:, 1:]
    assert squares.sum() >= 0.8 * 0.05 * broken.size / 16
    for severity, lines in enumerate((1, 2, 4, 8, 16), 1):
        dead = done("dead_lines", float(severity), grey(100))[..., 0] == 0
        assert max(dead.all(axis=0).sum(), dead.all(axis=1).sum()) == lines


def test_halo_grows_with_the_square_of_the_distance():
    change = np.abs(done("halo", 3.0, grey(128, (101, 101)))[..., 0] - 128)
    assert change[0, 0] == 45 and change[50, 50] == 0
    assert change[50, 0] == pytest.approx(45 / 2, abs=1)


def test_agc_has_the_stated_bits_and_clips_the_stated_share():
    pixels = np.random.default_rng(0).uniform(40, 200, (200, 200, 1)).astype(np.float32)
    for severity, (bits, clipped) in enumerate(((6, 1), (5, 2), (4, 5), (3, 10), (2, 20)), 1):
        levels, counts = np.unique(done("agc", float(severity), pixels), return_counts=True)
        assert len(levels) == 2**bits
        assert counts[0] / pixels.size >= clipped / 100


def test_polarity_and_shutter():
    pixels = SPLIT[0].thermal[..., None].astype(np.float32)
    np.testing.assert_array_equal(seen("polarity_flip", 0.0), 255 - pixels)
    flat = seen("flat_field", 0.0)
    assert (flat == flat[0, 0]).all() and flat[0, 0, 0] == np.rint(pixels.mean())


def test_crossover_takes_the_difference_of_each_object_to_its_surroundings():
    pixels, objects = grey(80, (60, 640)), np.zeros((60, 640), bool)
    for left, value in ((50, 180), (300, 120)):
        objects[20:40, left : left + 20] = True
        pixels[20:40, left : left + 20] = value
    for severity, beta in enumerate((0.25, 0.5, 0.75, 0.9, 1.0), 1):
        cooled = apply(pixels, "object_crossover", float(severity), objects, rng())[..., 0]
        assert cooled[30, 60] == np.rint(180 - beta * 100) and cooled[30, 310] == np.rint(120 - beta * 40)
        assert (cooled[~objects] == 80).all()
    assert OBJECTS == ("object_crossover",)


def test_shift_moves_whole_pixels_and_repeats_the_border():
    pixels = np.arange(480 * 640, dtype=np.float32).reshape(480, 640, 1) % 251
    for severity, distance in enumerate((2, 4, 8, 16, 32), 1):
        found = done("shift", float(severity), pixels)[..., 0]
        fits = [
            (dx, dy)
            for dx in range(-33, 34)
            for dy in range(-33, 34)
            if abs(np.hypot(dx, dy) - distance) < 1
            and (found[100:110, 100:110] == pixels[100 - dy : 110 - dy, 100 - dx : 110 - dx, 0]).all()
        ]
        assert fits, "moved by the stated distance"


def test_the_label_moves_with_its_modality_and_what_comes_in_is_ignored():
    frame = SPLIT[0]
    how = Degradation(kind="shift_with_label", severity=5.0)
    pixels = corrupt(frame, "rgb", how, SYNTHETIC)
    label = moved_label(frame.label, {"rgb": how, "thermal": Degradation()}, frame, 0, 255)
    cells = [(y, x) for y in range(20, 100, 7) for x in range(20, 140, 7) if label[y, x] != 255]
    offsets = [
        (dy, dx)
        for dy in range(-9, 10)
        for dx in range(-9, 10)
        if all(
            label[y, x] == frame.label[y - dy, x - dx] and (pixels[y, x] == frame.rgb[y - dy, x - dx]).all()
            for y, x in cells
        )
    ]
    assert len(offsets) == 1 and np.hypot(*offsets[0]) == pytest.approx(8, abs=1)
    assert (label == 255).any() and (frame.label != 255).all()
    big = frame.label.repeat(2, 0).repeat(2, 1)
    moved = moved_label(big, {"rgb": how, "thermal": Degradation()}, frame, 0, 255)
    np.testing.assert_array_equal(moved[::2, ::2], label)
