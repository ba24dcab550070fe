"""`crm predict`: class maps and overlays of pictures that a person brings, and what is said of those it cannot take."""

import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from crm.cli import app, main
from crm.conditions import CLEAN_TEST
from crm.confusion import confusion_matrix, load_evaluation
from crm.data.dataset import open_split
from crm.data.specs import MF, SYNTHETIC
from crm.predict import overlay, palette_picture, read_frame
from crm.records import evaluation
from tests.network_file import imported, network

SIZE = (64, 96)  # of the frames the run is evaluated on


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A home folder with one run."""
    folder = tmp_path_factory.mktemp("home")
    sizes = {"data.size": SIZE, "data.crop": (32, 48), "data.scale": (1.0, 1.0), "data.test_images": 2}
    imported(folder / "runs", "synthetic", SYNTHETIC.num_classes, sizes)
    return folder


@pytest.fixture
def run(home, monkeypatch, tmp_path) -> str:
    """Its id; what is written without --out goes to this test's own folder."""
    monkeypatch.setenv("CRM_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(home / "runs")
    return next((home / "runs").iterdir()).name


def crm(*arguments: object) -> dict:
    done = CliRunner().invoke(app, [*map(str, arguments), "--threads", "1", "--json"], catch_exceptions=False)
    assert done.exit_code in (0, 3), done.output
    return json.loads(done.stdout)


def refused(*arguments: object, monkeypatch, capsys) -> str:
    """The one line that the command answers; it must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["crm", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.startswith("crm: ") and said.err.count("\n") == 1, said.err
    return said.err


def save(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


def scenes(size: tuple[int, int] = SIZE, count: int = 2) -> list:
    return list(open_split("synthetic", "test", size=size, limit=count))


def class_map(path: str | Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.mode == "P"
        return np.asarray(picture)


# ---------------------------------------------------------------------------------------------- what is predicted


def test_a_class_map_is_what_evaluation_counts(run, home, tmp_path):
    crm("evaluate", run, "--suite", "clean")
    stored = load_evaluation(evaluation(home / "runs" / run, "last", CLEAN_TEST))
    frames = scenes()
    files = [save(tmp_path / f"{f.name}.png", np.dstack([f.rgb, f.thermal])) for f in frames]
    said = crm("predict", run, *files)
    assert said["run"] == run and Path(said["out"]) == tmp_path / "predictions" / f"{run}-last"
    for i, (frame, one) in enumerate(zip(frames, said["images"], strict=True)):
        classes = class_map(one["labels"])
        matrix = confusion_matrix(frame.label, classes, SYNTHETIC.num_classes, SYNTHETIC.ignore_index)
        np.testing.assert_array_equal(matrix, stored.confusion[i])
        shares = {SYNTHETIC.classes[c]: (classes == c).mean() for c in np.unique(classes)}
        assert one["shares"] == pytest.approx(shares) and list(one["size"]) == list(SIZE)


def test_four_channels_and_two_files_are_the_same_input(run, tmp_path):
    frame = scenes(count=1)[0]
    four = save(tmp_path / "four.png", np.dstack([frame.rgb, frame.thermal]))
    rgb, thermal = save(tmp_path / "rgb.png", frame.rgb), save(tmp_path / "heat.png", frame.thermal)
    three = save(tmp_path / "grey.png", np.dstack([frame.thermal] * 3))
    maps = [class_map(crm("predict", run, *inputs, "--out", tmp_path / str(i))["images"][0]["labels"])
            for i, inputs in enumerate([[four], [rgb, "--thermal", thermal], [rgb, "--thermal", three]])]  # fmt: skip
    assert len(np.unique(maps[0])) > 1
    assert (maps[0] == maps[1]).all() and (maps[0] == maps[2]).all()


def test_colours_are_not_multiplied_by_the_temperature(tmp_path):
    frame = scenes(count=1)[0]
    cold = np.dstack([frame.rgb, np.zeros_like(frame.thermal)])
    read = read_frame(save(tmp_path / "cold.png", cold), None)
    assert (read.rgb == frame.rgb).all() and not read.thermal.any()


def test_three_channels_of_thermal_are_averaged(tmp_path):
    rng = np.random.default_rng(0)
    three = (rng.integers(20, 200, (8, 9, 1)) + rng.integers(-3, 4, (8, 9, 3))).astype(np.uint8)  # as JPEG leaves them
    rgb, heat = save(tmp_path / "rgb.png", three), save(tmp_path / "heat.png", three)
    np.testing.assert_array_equal(read_frame(rgb, heat).thermal, np.floor(three.mean(axis=2) + 0.5))


@pytest.mark.parametrize("size", [(1, 40), (33, 250), (160, 16)])
def test_any_size_is_predicted_at_its_own_size(size, run, tmp_path):
    four = np.random.default_rng(1).integers(0, 256, (*size, 4)).astype(np.uint8)
    for more in ([], ["--size", "40x48"]):
        one = crm("predict", run, save(tmp_path / "odd.png", four), "--force", *more)["images"][0]
        assert class_map(one["labels"]).shape == size
        with Image.open(one["overlay"]) as shown:
            assert shown.height > size[0] and shown.width >= size[1]


def test_size_is_what_the_network_sees(run, tmp_path):
    """Resized as frames are for training, and the scores enlarged to the picture."""
    frame = scenes((128, 192), 1)[0]
    path = save(tmp_path / "large.png", np.dstack([frame.rgb, frame.thermal]))
    found = class_map(crm("predict", run, path, "--size", "64x96")["images"][0]["labels"])
    small = [np.array(Image.fromarray(x).resize((96, 64), Image.Resampling.BILINEAR))
             for x in (frame.rgb, frame.thermal)]  # fmt: skip
    four = np.dstack(small).astype(np.float64)
    image = torch.from_numpy((four - SYNTHETIC.mean) / SYNTHETIC.std).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        classes, masks = (logits[-1, 0] for logits in network(SYNTHETIC.num_classes)(image))
        resized = torch.nn.functional.interpolate(masks[None], (64, 96), mode="bilinear").sigmoid()[0]
        scores = torch.einsum("qk,qhw->khw", classes.softmax(1)[:, :-1], resized)
        wanted = torch.nn.functional.interpolate(scores[None], (128, 192), mode="bilinear")[0].argmax(0).numpy()
    assert (found != wanted).mean() < 0.001
    assert "128x192" in CliRunner().invoke(app, ["predict", run, str(path), "--force"]).stderr


# ---------------------------------------------------------------------------------------------- what is written


def test_a_class_map_is_a_palette_picture_in_the_data_sets_colours():
    classes = np.arange(MF.num_classes, dtype=np.uint8).reshape(3, 3)
    picture = palette_picture(classes, MF)
    assert picture.mode == "P" and (np.asarray(picture) == classes).all()
    assert tuple(map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist())) == MF.colours


def test_an_overlay_blends_colours_leaves_the_unlabelled_and_has_a_legend_of_what_occurs():
    rgb = np.full((400, 500, 3), 200, np.uint8)
    classes = np.zeros((400, 500), np.uint8)
    classes[:, 250:] = MF.classes.index("bike")
    shown = np.asarray(overlay(rgb, classes, MF))
    assert shown[10, 10].tolist() == [200, 200, 200]
    assert shown[10, 300].tolist() == [100, 164, 196]
    legend = shown[400:].reshape(-1, 3)
    there = [name for name, colour in zip(MF.classes, MF.colours, strict=True) if (legend == colour).all(1).sum() > 50]
    assert there == ["unlabeled", "bike"]


def test_what_is_there_is_only_overwritten_on_request(run, tmp_path, monkeypatch, capsys):
    frame = scenes(count=1)[0]
    path = save(tmp_path / "a.png", np.dstack([frame.rgb, frame.thermal]))
    written = Path(crm("predict", run, path)["images"][0]["labels"])
    written.write_bytes(b"kept")
    assert "--force" in refused("predict", run, path, monkeypatch=monkeypatch, capsys=capsys)
    assert written.read_bytes() == b"kept"
    crm("predict", run, path, "--force")
    assert class_map(written).shape == SIZE
    mine = save(tmp_path / "a_labels.png", np.dstack([frame.rgb, frame.thermal]))
    before = mine.read_bytes()
    said = refused("predict", run, path, mine, "--out", tmp_path, "--force", monkeypatch=monkeypatch, capsys=capsys)
    assert "is an input" in said and mine.read_bytes() == before


# ---------------------------------------------------------------------------------------------- what is refused


def claiming(path: Path, width: int, height: int) -> Path:
    """A small PNG whose header says another size."""
    save(path, np.zeros((2, 2, 4), np.uint8))
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    return path


def deep_rgba(path: Path) -> Path:
    """A PNG of four channels with 16 bits each, which Pillow cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes(8 * 40) for _ in range(40))
    header = struct.pack(">IIBBBBB", 40, 40, 16, 6, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def wrong_inputs(folder: Path) -> dict[str, tuple[list, str, str]]:
    """What -> arguments, the file the answer names, and what it says."""
    rng = np.random.default_rng(0)
    four = save(folder / "four.png", rng.integers(0, 256, (40, 50, 4)).astype(np.uint8))
    rgb = save(folder / "rgb.png", rng.integers(0, 256, (40, 50, 3)).astype(np.uint8))
    heat = save(folder / "heat.png", rng.integers(0, 256, (40, 50)).astype(np.uint8))
    small = save(folder / "small.png", rng.integers(0, 256, (20, 25)).astype(np.uint8))
    false_colour = save(folder / "inferno.png", rng.integers(0, 256, (40, 50, 3)).astype(np.uint8))
    sixteen = save(folder / "sixteen.png", rng.integers(0, 9999, (40, 50)).astype(np.uint16))
    cut = folder / "cut.png"
    cut.write_bytes(four.read_bytes()[:900])
    (folder / "text.png").write_text("no picture")
    (folder / "taken").write_text("a file")
    (folder / "more").mkdir()
    twin = save(folder / "more" / "four.png", np.zeros((4, 4, 4), np.uint8))
    return {
        "a missing file": (["absent.png"], "absent.png", "is missing"),
        "no picture": (["text.png"], "text.png", "no known format"),
        "a folder": (["more"], "more", "cannot be read"),
        "a cut file after a good one": ([four, cut], "cut.png", "cannot be read as a picture"),
        "three channels alone": ([rgb], "rgb.png", "--thermal"),
        "four channels and a thermal file": ([four, "--thermal", heat], "four.png", "three 8-bit channels"),
        "fewer thermal files": ([rgb, four, "--thermal", heat], "2 images and 1", "one for each"),
        "another size": ([rgb, "--thermal", small], "small.png is 20x25", "pixel by pixel"),
        "a missing thermal file": ([rgb, "--thermal", "gone.png"], "gone.png", "is missing"),
        "16 bits": ([rgb, "--thermal", sixteen], "sixteen.png", "16 bits per channel; scale it to 8"),
        "16 bits in four channels": ([deep_rgba(folder / "deep.png")], "deep.png", "16 bits per channel"),
        "thermal in colours": ([rgb, "--thermal", false_colour], "inferno.png", "must be grey"),
        "two of one name": ([four, twin], "more/four.png", "one at a time"),
        "more than memory holds": ([claiming(folder / "huge.png", 12_000, 12_000)], "huge.png", "GiB of memory"),
        "too small a picture": ([twin], "more/four.png is 4x4", "--size enlarges"),
        "a size that is none": ([four, "--size", "480"], "480", "480x640"),
        "an out that is a file": ([four, "--out", "taken"], "taken", "is no folder"),
        "an out below a file": ([four, "--out", "taken/below"], "taken/below", "cannot write"),
        "a checkpoint that is not there": ([four, "--select", "val_best"], "val_best", "it has last"),
        "a device of no kind": ([four, "--device", "gpu"], "'gpu'", "cuda:N"),
        "a device that is not there": ([four, "--device", "cuda:77"], "cuda:77", "PyTorch finds"),
    }  # fmt: skip


def test_wrong_input_is_named_and_nothing_is_written(run, tmp_path, monkeypatch, capsys):
    cases = wrong_inputs(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for what, (arguments, named, hint) in cases.items():
        said = refused("predict", run, *arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert named in said and hint in said, f"{what}: {said}"
        assert sorted(tmp_path.rglob("*")) == before, f"{what} left something behind"
    assert "no run 'abc'" in refused("predict", "abc", "four.png", monkeypatch=monkeypatch, capsys=capsys)


def test_a_failure_in_the_middle_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    """The second picture vanishes after it has been looked at."""
    from crm import predict

    frame = scenes(count=1)[0]
    files = [save(tmp_path / name, np.dstack([frame.rgb, frame.thermal])) for name in ("a.png", "b.png")]
    whole = predict.predict

    def vanishing(*arguments):
        files[1].unlink(missing_ok=True)
        return whole(*arguments)

    monkeypatch.setattr(predict, "predict", vanishing)
    assert "b.png is missing" in refused("predict", run, *files, monkeypatch=monkeypatch, capsys=capsys)
    assert not (tmp_path / "predictions").exists()


def test_a_file_of_weights_predicts_too(run, home, tmp_path):
    frame = scenes(count=1)[0]
    path = save(tmp_path / "a.png", np.dstack([frame.rgb, frame.thermal]))
    found = [crm("predict", target, path, "--out", tmp_path / str(i))["images"][0]
             for i, target in enumerate([run, home / "synthetic-0.ckpt"])]  # fmt: skip
    assert (class_map(found[0]["labels"]) == class_map(found[1]["labels"])).all()
