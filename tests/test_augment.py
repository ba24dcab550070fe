"""Augmentation of both recipes: sizes, resizing, colour jitter with its released defect, and what stays aligned."""

import colorsys
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crm.config import Data
from crm.data import transforms
from crm.data.frames import Frame
from crm.data.hsv import byte_hsv, byte_rgb, float_hsv, float_rgb
from crm.data.transforms import augment, released_jitter, resize_bytes, resize_floats, resized, short_sides, to_tensors

MF = Data()
PST900 = Data(dataset="pst900", size=(720, 1280), crop=(360, 640))
KP = Data(dataset="kp", size=(512, 640), crop=(256, 320))
RELEASED = {"float_resize": True, "float_jitter": True}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(height: int, width: int, seed: int = 0) -> Frame:
    """A frame of independent random pixels, with labels 0 to 8."""
    rng = np.random.default_rng(seed)
    rgb, thermal = rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, 256, (height, width), np.uint8)
    return Frame(name="0D", rgb=rgb, thermal=thermal, label=rng.integers(0, 9, (height, width), np.uint8), night=False)


# sizes


def test_short_sides_are_the_sixteen_of_the_released_code():
    assert short_sides(MF) == list(range(240, 961, 48))
    assert short_sides(PST900) == list(range(360, 1441, 72))
    assert short_sides(KP) == [256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024]


def sizes(data: Data) -> list[tuple[int, int]]:
    """The size after the resize for each of the equally likely draws."""
    count = len(short_sides(data))
    return [resized(data.size, data, (k + 0.5) / count) for k in range(count)]


def test_the_long_side_follows_and_stops_at_1920():
    assert sizes(MF)[0] == (240, 320) and sizes(MF)[-1] == (960, 1280)
    assert Counter(sizes(PST900))[1080, 1920] == 6
    assert max(max(size) for size in sizes(PST900)) == 1920
    assert sizes(KP)[:3] == [(256, 320), (307, 384), (358, 448)]  # 383.75 and 447.5, halves upwards


def test_the_short_side_is_drawn_evenly():
    drawn = Counter(resized(MF.size, MF, draw)[0] for draw in np.random.default_rng(0).random(16_000))
    assert len(drawn) == 16
    assert all(abs(count - 1000) < 5 * math.sqrt(1000) for count in drawn.values())


def test_without_a_step_any_size_of_the_range_is_drawn():
    free = replace(MF, scale_step=0.0)
    drawn = [resized(MF.size, free, draw) for draw in np.random.default_rng(0).random(2000)]
    assert len({height for height, _ in drawn}) > 500
    assert min(drawn) >= (240, 320) and max(drawn) <= (960, 1280)
    assert resized(MF.size, replace(free, scale=(1.0, 1.0)), 0.7) == MF.size


def test_a_range_without_a_multiple_of_the_step_is_refused():
    with pytest.raises(ValueError, match=r"no multiple of data.scale_step 0.1 lies in data.scale \(0.92, 0.98\)"):
        augment(noise(480, 640), replace(MF, scale=(0.92, 0.98)), seeded(0))


# resizing


def bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear at pixel centres without antialias, written out: the reference for the released code's resize."""
    out = image.astype(np.float64)
    for axis, wanted in enumerate(size):
        given = out.shape[axis]
        at = np.clip((np.arange(wanted) + 0.5) * given / wanted - 0.5, 0, None)
        low = np.minimum(np.floor(at).astype(int), given - 1)
        high = np.minimum(low + 1, given - 1)
        share = (at - low).reshape(-1, *[1] * (out.ndim - 1 - axis))
        out = np.take(out, low, axis) * (1 - share) + np.take(out, high, axis) * share
    return out


@pytest.mark.parametrize("size", [(24, 32), (31, 41), (48, 64), (77, 103)])
def test_the_released_resize_is_bilinear_of_floats_without_antialias(size):
    frame = noise(48, 64)
    image, label = resize_floats(*to_tensors(frame), size)
    assert image.dtype == torch.float32
    for channel, values in enumerate([*frame.rgb.transpose(2, 0, 1), frame.thermal]):
        assert np.abs(image[channel].numpy() - bilinear(values, size)).max() < 2e-3
    rows, columns = (
        np.floor(np.arange(new) * (old / new)).astype(int) for new, old in zip(size, (48, 64), strict=True)
    )
    assert np.array_equal(label.numpy(), frame.label[rows][:, columns])


@pytest.mark.parametrize("size", [(24, 32), (31, 41), (77, 103)])
def test_the_clean_resize_is_pillows(size):
    frame = noise(48, 64)
    image, _ = resize_bytes(*to_tensors(frame), size)
    assert image.dtype == torch.uint8
    for channel, values in enumerate([*frame.rgb.transpose(2, 0, 1), frame.thermal]):
        expected = np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))
        assert np.abs(image[channel].numpy().astype(int) - expected).max() <= 1


def test_antialias_is_what_tells_the_two_apart():
    frame = noise(96, 128)
    spread = [image.float().std() for image, _ in (resize(*to_tensors(frame), (32, 43)) for resize in
                                                  (resize_bytes, resize_floats))]  # fmt: skip
    assert spread[0] < 0.7 * spread[1]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**40),
    low=st.floats(0.75, 1.0),
    high=st.floats(1.0, 2.0),
    step=st.sampled_from([0.0, 0.05, 0.1]),
    flip=st.floats(0, 1),
    longest=st.integers(100, 200),
    floats=st.booleans(),
    jitters=st.booleans(),
)
def test_a_marker_stays_aligned_in_rgb_thermal_and_label(seed, low, high, step, flip, longest, floats, jitters):
    label = np.zeros((64, 96), np.uint8)
    row, column = np.random.default_rng(seed).integers((8, 8), (48, 80))
    label[row : row + 9, column : column + 11] = 1
    value = np.where(label == 1, np.uint8(250), np.uint8(0))
    frame = Frame(name="0D", rgb=np.dstack([value] * 3), thermal=value, label=label, night=False)
    data = Data(size=(64, 96), crop=(44, 60), scale=(low, high), scale_step=step, longest=longest, flip=flip,
                jitter=float(jitters), float_resize=floats, float_jitter=floats)  # fmt: skip
    image, moved = augment(frame, data, seeded(seed))
    assert image.shape == (4, 44, 60) and set(moved.unique().tolist()) <= {0, 1}
    inside = moved.bool()
    border = torch.cat([moved[0], moved[-1], moved[:, 0], moved[:, -1]])
    if not inside.any() or border.any():
        return  # cut by the crop: what is left may be too narrow to compare
    for channel in image.float():
        # brightness and contrast move both levels alike, so half way between them is the marker's edge
        bright = channel > (channel.max() + channel.min()) / 2
        both, either = (bright & inside).sum(), (bright | inside).sum()
        assert both / either > 0.6  # a shift by two pixels would leave less
        where = [torch.nonzero(mask).float().mean(dim=0) for mask in (bright, inside)]
        assert (where[0] - where[1]).abs().max() < 1.1  # the label's nearest pixel, and half of one at the edges


# randomness


@pytest.mark.parametrize("change", [{"flip": 0.0}, {"jitter": 0.0}, {"scale": (1.0, 1.0)}, {"scale_step": 0.0},
                                    {"float_jitter": True}, {"float_resize": True}, {"longest": 700}])  # fmt: skip
def test_switching_a_step_leaves_every_later_draw_as_it_was(change):
    frame, data = noise(96, 128), Data(size=(96, 128), crop=(40, 50))
    ones, others = seeded(3), seeded(3)
    augment(frame, data, ones)
    augment(frame, replace(data, **change), others)
    assert torch.equal(torch.rand(4, generator=ones), torch.rand(4, generator=others))


def test_at_scale_one_without_jitter_only_flips_are_left():
    frame, data = noise(64, 96), Data(size=(64, 96), crop=(64, 96), scale=(1.0, 1.0), jitter=0.0)
    plain, label = to_tensors(frame)
    flips = 0
    for seed in range(200):
        image, moved = augment(frame, data, seeded(seed))
        turned = not torch.equal(image, plain)
        assert torch.equal(image, plain.flip(-1) if turned else plain)
        assert torch.equal(moved, label.flip(-1) if turned else label)
        flips += turned
    assert 70 < flips < 130


# colours


# Recorded from OpenCV 4.7.0, the version the released code names, on bytes: RGB, its HSV, another HSV, its RGB.
OPENCV = [
    ((80, 80, 200), (120, 153, 200), (140, 122, 200), (168, 104, 200)),
    ((10, 20, 30), (105, 170, 30), (125, 136, 30), (16, 14, 30)),
    ((255, 0, 1), (0, 255, 255), (20, 204, 255), (255, 187, 50)),
    ((7, 7, 7), (0, 0, 7), (20, 0, 7), (7, 7, 7)),
    ((200, 100, 50), (10, 191, 200), (30, 152, 200), (200, 200, 80)),
    ((1, 2, 0), (45, 255, 2), (65, 204, 2), (0, 2, 0)),
    ((33, 200, 120), (76, 213, 200), (96, 170, 200), (66, 173, 200)),
    ((254, 253, 255), (135, 2, 255), (155, 1, 255), (255, 254, 254)),
]


def pixels(*colours: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(colours, dtype=torch.float32).T[:, None, :]


def test_hue_saturation_and_value_of_bytes_are_those_of_opencv():
    rgb, hsv, changed, back = (pixels(*colours) for colours in zip(*OPENCV, strict=True))
    assert torch.equal(byte_hsv(rgb), hsv)
    assert torch.equal(byte_rgb(changed), back)


@settings(max_examples=60)
@given(st.tuples(*[st.floats(0, 255, width=32)] * 3))
def test_hue_saturation_and_value_of_floats_are_the_usual_ones(colour):
    hue, saturation, value = float_hsv(pixels(colour))[:, 0, 0].tolist()
    expected = colorsys.rgb_to_hsv(*colour)
    assert value == expected[2]
    if value > 1 and expected[1] > 0.01:
        assert saturation == pytest.approx(expected[1], abs=1e-4)
        assert min(abs(hue - 360 * expected[0]), 360 - abs(hue - 360 * expected[0])) < 0.1
        assert float_rgb(float_hsv(pixels(colour)))[:, 0, 0].tolist() == pytest.approx(colour, abs=0.02)


def test_bytes_and_back_lose_little():
    grid = pixels(*[(r, g, b) for r in range(0, 256, 15) for g in range(0, 256, 15) for b in range(0, 256, 15)])
    hsv = byte_hsv(grid)
    assert hsv[0].max() < 180 and hsv.min() >= 0 and torch.equal(hsv, hsv.round())
    assert (byte_rgb(hsv) - grid).abs().max() <= 6


def fires(**on: float) -> list[float]:
    """Draws of the jitter in which only the named parts fire, each with its own amount of 0..1."""
    draws = [0.9] * 6 + [0.5] * 6
    for name, (part, amount) in {"brightness": (0, 6), "contrast": (1, 7), "saturation": (2, 8), "hue": (3, 9),
                                 "thermal": (4, 10)}.items():  # fmt: skip
        if name in on:
            draws[part], draws[amount] = 0.1, on[name]
    if on.get("first"):
        draws[5] = 0.1
    return draws


def colour_after(colour: tuple[int, int, int], **on: float) -> list[float]:
    image = torch.tensor([*colour, 90], dtype=torch.float32)[:, None, None].expand(4, 2, 2).clone()
    return released_jitter(image, 1.0, fires(**on))[:, 0, 0].tolist()


BLUE = (80, 80, 200)  # saturation 0.6


def test_saturation_of_floats_makes_pictures_grey():
    assert colour_after(BLUE, saturation=0.9) == [200, 200, 200, 90]
    assert colour_after((20, 20, 200), saturation=1.0) == [0, 0, 200, 90]  # 0.9 * 1.5 is cut to 1: fully saturated
    assert colour_after(BLUE, saturation=0.5, hue=0.5)[:3] == [200, 200, 200]


def test_hue_of_floats_turns_blue_into_yellow():
    red, green, blue, thermal = colour_after(BLUE, hue=0.5)
    assert (red, green) == (200, 200) and blue == pytest.approx(80) and thermal == 90


@pytest.mark.parametrize("earlier", [{"brightness": 0.5}, {"contrast": 0.5, "first": 1.0}])
def test_an_earlier_brightness_or_contrast_heals_it(earlier):
    for later in ({"saturation": 0.9}, {"hue": 0.5}):
        red, green, blue, _ = colour_after(BLUE, **earlier, **later)
        assert blue > 190 and red < 100 and green < 100


def test_contrast_after_saturation_heals_nothing():
    assert colour_after(BLUE, saturation=0.5, contrast=0.5) == [200, 200, 200, 90]


def test_what_fires_alone_cuts_fractions_off_and_stays_in_range():
    image = torch.full((4, 1, 1), 100.7)
    assert released_jitter(image, 1.0, fires(brightness=0.75))[:, 0, 0].tolist() == [116.0] * 3 + [image[3].item()]
    assert released_jitter(image, 1.0, fires(thermal=1.0))[:, 0, 0].tolist() == [image[0].item()] * 3 + [151.0]
    assert released_jitter(torch.full((4, 1, 1), 250.0), 1.0, fires(contrast=1.0)).max() == 255
    assert torch.equal(released_jitter(image, 1.0, fires()), image)


DRAWN = 3000  # images of a statistical test


def share(draw_jitter, broken) -> float:
    rng = np.random.default_rng(0)
    image = torch.tensor([*BLUE, 90.0])[:, None, None]
    return float(np.mean([broken(draw_jitter(image, 1.0, rng.random(12).tolist())[:, 0, 0]) for _ in range(DRAWN)]))


def test_nine_of_thirty_two_images_are_broken():
    def not_blue(pixel: torch.Tensor) -> bool:
        return bool(pixel[2] <= pixel[:2].max())

    assert share(released_jitter, not_blue) == pytest.approx(9 / 32, abs=4 * math.sqrt(9 / 32 * 23 / 32 / DRAWN))
    assert (
        share(lambda image, *how: transforms.jitter(image.to(torch.uint8), *how), not_blue) < 0.002
    )  # hue at its limit


def test_each_part_fires_in_half_of_the_images():
    image = torch.tensor([100.0, 100.0, 100.0, 60.0])[:, None, None]  # grey: only brightness and contrast show
    rng = np.random.default_rng(1)
    out = torch.stack([released_jitter(image, 1.0, rng.random(12).tolist())[:, 0, 0] for _ in range(DRAWN)])
    rgb, thermal = out[:, 0], out[:, 3]
    assert (rgb != 100).float().mean() == pytest.approx(3 / 4, abs=0.04)  # brightness or contrast, rarely by nothing
    assert (thermal != 60).float().mean() == pytest.approx(1 / 2, abs=0.04)
    assert thermal.min() >= 30 and thermal.max() < 90
    assert abs(np.corrcoef(rgb.numpy(), thermal.numpy())[0, 1]) < 0.07  # draws of their own


def test_the_hue_is_turned_by_whole_steps_of_two_degrees_up_to_thirty_six():
    seen = set()
    for amount in np.linspace(0, 0.999, 75):
        image = torch.tensor([200.0, 0.0, 0.0, 0.0])[:, None, None]
        turned = released_jitter(image, 1.0, fires(brightness=0.5, hue=float(amount)))[:3]
        seen.add(int((byte_hsv(turned)[0].item() + 90) % 180 - 90))
    assert seen == set(range(-18, 19))


@pytest.mark.parametrize("how", [{}, {"float_resize": True}, {"float_jitter": True}, RELEASED])
def test_only_the_float_jitter_hands_floats_on(how):
    dtype = torch.float32 if how.get("float_jitter") else torch.uint8
    data = Data(size=(96, 128), crop=(40, 50), **how)
    for seed in range(6):
        image, label = augment(noise(96, 128), data, seeded(seed))
        assert image.dtype == dtype and label.dtype == torch.uint8
        assert image.min() >= 0 and image.max() <= 255
