"""Batches as a function of (seed, step): order, workers, resuming; decoded frames kept for several processes."""

import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from crm.config import Config, Data, override
from crm.data.cache import HEADER, Mapped, Shared
from crm.data.dataset import Split, open_run_split, open_split
from crm.data.export import write_synthetic
from crm.data.frames import Frame
from crm.data.loader import batches, indices, make_batch
from crm.machine import Machine
from crm.records import claim, open_run
from crm.train import train
from tests.tiny import TINY

ROOT = Path(__file__).parents[1]
SMALL = (64, 96)
AUGMENTED = Data(dataset="mf", size=SMALL, crop=(40, 56), scale=(0.7, 1.6))
RELEASED = Data(dataset="mf", size=SMALL, crop=(40, 56), scale=(0.7, 1.6), float_resize=True, float_jitter=True,
                drop_last=True)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Eleven training frames in the MF layout."""
    folder = tmp_path_factory.mktemp("data")
    write_synthetic("mf", folder / "mfnet", counts={"train": 11, "val": 3}, size=SMALL)
    return folder


def fresh(root: Path, cache: Path | None = None) -> Split:
    """The training split with nothing decoded yet."""
    split = open_split("mf", "train", data_root=root, size=SMALL)
    split.cache = cache
    return split


def made(config: Config, split: Split, start: int, workers: int) -> list[bytes]:
    """Every batch from a step on, as bytes."""
    return [
        batch.image.numpy().tobytes() + batch.label.numpy().tobytes() + repr(batch.valid).encode()
        for batch in batches(config, split, start, workers)
    ]


# order and workers


@pytest.mark.parametrize("data", [AUGMENTED, RELEASED], ids=["clean", "released"])
def test_batches_do_not_depend_on_workers_or_on_where_a_run_resumed(root, tmp_path, data):
    config = Config(data=data, batch=3, steps=9, seed=4)
    alone = made(config, fresh(root), 0, workers=0)
    assert len(set(alone)) == 9
    assert made(config, fresh(root), 0, workers=1) == alone
    assert made(config, fresh(root), 0, workers=4) == alone
    assert made(config, fresh(root, tmp_path), 0, workers=2) == alone
    for step in (1, 5, 8):
        assert made(config, fresh(root), step, workers=0) == alone[step:]
    assert made(config, fresh(root), 5, workers=4) == alone[5:]


def test_batches_do_not_depend_on_the_number_of_threads(root):
    config = Config(data=RELEASED, batch=3, steps=4)
    before = torch.get_num_threads()
    try:
        by_threads = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            by_threads.append(made(config, fresh(root), 0, workers=0))
    finally:
        torch.set_num_threads(before)
    assert by_threads[0] == by_threads[1]


def test_variants_at_equal_seed_see_the_same_images():
    split = open_run_split(TINY.data, "train", None)
    plain = override(TINY, {"masking.kind": "none", "loss.masked": 0.0, "loss.complementary": 0.0,
                            "loss.non_local": 0.0})  # fmt: skip
    one, two = (make_batch(config, split, 3) for config in (TINY, plain))
    assert torch.equal(one.image, two.image) and torch.equal(one.label, two.label)


def test_seeds_see_other_orders_and_other_augmentations(root):
    config = Config(data=AUGMENTED, batch=3, steps=2)
    assert not set(made(config, fresh(root), 0, 0)) & set(made(override(config, {"seed": 1}), fresh(root), 0, 0))


def test_starting_workers_draws_no_random_number(root):
    config = Config(data=AUGMENTED, batch=3, steps=2)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    made(config, fresh(root), 0, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_drop_last_epochs_follow_one_another_without_a_gap():
    seen = [index for step in range(11) for index in indices(5, images=11, batch=3, step=step, drop_last=False)]
    for epoch in range(3):
        assert sorted(seen[11 * epoch : 11 * (epoch + 1)]) == list(range(11))
    assert seen[:11] != seen[11:22]


def test_drop_last_leaves_out_the_last_incomplete_batch_of_each_epoch():
    left_out = []
    for epoch in range(20):
        seen = [i for step in range(3) for i in indices(5, 11, 3, step=3 * epoch + step, drop_last=True)]
        assert len(set(seen)) == 9
        left_out += set(range(11)) - set(seen)
    assert len(Counter(left_out)) > 8  # other ones in each epoch


def test_drop_last_refuses_a_split_smaller_than_a_batch(root):
    config = Config(data=RELEASED, batch=12, steps=2)
    with pytest.raises(ValueError, match=r"data\.drop_last leaves nothing of 11 frames in batches of 12"):
        made(config, fresh(root), 0, workers=0)


def test_a_broken_frame_stops_a_worker_with_the_same_line(root, tmp_path):
    folder = tmp_path / "mfnet"
    shutil.copytree(root / "mfnet", folder)
    for picture in (folder / "images").glob("train*.png"):
        picture.write_bytes(picture.read_bytes()[:400])
    # in a process of its own, because the type checker of the tests looks into sequences and would meet the frame first
    script = f"""
from pathlib import Path
from crm.config import Config
from crm.data.dataset import open_split
from crm.data.loader import batches
from tests.test_loader import AUGMENTED
split = open_split("mf", "train", data_root=Path({str(tmp_path)!r}), size=(64, 96))
for workers in (0, 2):
    try:
        next(batches(Config(data=AUGMENTED, batch=3, steps=2), split, 0, workers))
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    alone, by_worker = done.stdout.splitlines()
    assert alone == by_worker and re.search(r"train_\d+[DN]\.png cannot be read as a picture", alone)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_with_workers_and_a_cache_is_training_without(root, tmp_path, one_thread):
    config = override(TINY, {"steps": 4, "val_every": 4, "data.dataset": "mf", "data.train_images": 11})

    def trained(name: str, pauses: int, **how) -> bytes:
        machine = Machine(runs=tmp_path / name, data=root, **how)
        folder = open_run(machine.runs, config)
        asked = iter([False, True])
        for attempt in range(pauses + 1):
            mine = claim(folder, f"token{attempt}")
            assert mine is not None
            stop = asked.__next__ if attempt < pauses else lambda: False
            assert train(config, machine, mine, stop, lambda progress: None) is (attempt == pauses)
            mine.release()
        return (folder / "checkpoints/val_best.safetensors").read_bytes()

    plain = trained("plain", pauses=0)
    assert trained("workers", pauses=1, loader_workers=2, cache=tmp_path / "cache") == plain
    assert len(list((tmp_path / "cache").glob("*.frames"))) == 2


def test_workers_end_when_nobody_wants_their_batches_any_more(root):
    prepared = batches(Config(data=AUGMENTED, batch=3, steps=500), fresh(root), 0, workers=2)
    next(prepared)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    del prepared
    for worker in workers:
        worker.join(20)
    assert not any(worker.is_alive() for worker in workers)


def test_signals_meant_for_the_whole_job_do_not_end_workers(root):
    config = Config(data=AUGMENTED, batch=3, steps=12)
    alone = made(config, fresh(root), 0, workers=0)
    prepared = batches(config, fresh(root), 0, workers=2)
    got = [next(prepared)]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        for worker in multiprocessing.active_children():
            assert worker.pid is not None
            os.kill(worker.pid, number)
        got.append(next(prepared))
    got += prepared
    assert [batch.image.numpy().tobytes() for batch in got] == [one[: got[0].image.numel() * 4] for one in alone]


def test_the_benchmark_measures_every_combination():
    command = [sys.executable, "-m", "benchmarks.loader", "--frames", "8", "--batch", "2", "--workers", "0,1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    speeds = json.loads(done.stdout)["images_per_second"]
    assert speeds.keys() == {"released", "uncached", "ram", "file"}
    assert all(sorted(by_count) == ["0", "1"] for by_count in speeds.values())
    assert all(speed > 0 for by_count in speeds.values() for speed in by_count.values())


# decoded frames for several processes


def test_what_a_worker_has_decoded_is_there_for_all(root, tmp_path):
    shutil.copytree(root / "mfnet", tmp_path / "mfnet")
    split = fresh(tmp_path)
    config = Config(data=AUGMENTED, batch=3, steps=4)
    first = made(config, split, 0, workers=2)
    shutil.rmtree(tmp_path / "mfnet")
    assert made(config, split, 0, workers=2) == first
    assert made(config, split, 0, workers=0) == first


@pytest.fixture
def frames(root) -> list[Frame]:
    return list(fresh(root))


def refuse(index: int) -> Frame:
    raise AssertionError(f"frame {index} was decoded again")


def mapped(path: Path, frames: list[Frame], load=None) -> Mapped:
    about = {"dataset": "mf", "split": "train", "size": list(SMALL), "sha256": "ab" * 32}
    return Mapped(path, about, [frame.name for frame in frames], load or frames.__getitem__)


def all_of(store: Mapped | Shared, frames: list[Frame]) -> list[Frame | None]:
    return [store.get(index, frame.name, frame.night) for index, frame in enumerate(frames)]


def test_a_cache_file_is_made_once_and_gives_the_same_frames(tmp_path, frames):
    path = tmp_path / "cache" / "x.frames"
    for load in (None, refuse):
        back = all_of(mapped(path, frames, load), frames)
        assert all(other and frame.same_as(other) for frame, other in zip(frames, back, strict=True))
        with pytest.raises(ValueError, match="read-only"):
            back[0].rgb[:] = 0  # pyright: ignore[reportOptionalMemberAccess]
    assert sorted(each.name for each in path.parent.iterdir()) == ["x.frames", "x.lock"]


@pytest.mark.parametrize("damage", ["cut off", "other header", "no header", "empty"])
def test_a_damaged_cache_file_is_made_again_with_a_warning(tmp_path, frames, caplog, damage):
    path = tmp_path / "x.frames"
    mapped(path, frames)
    whole = path.read_bytes()
    other = {
        "cut off": whole[:-100],
        "other header": whole.replace(b"abab", b"acab", 1),
        "no header": b"\xff" * HEADER + whole[HEADER:],
        "empty": b"",
    }
    path.write_bytes(other[damage])
    assert all(a.same_as(b) for a, b in zip(frames, all_of(mapped(path, frames), frames), strict=True))
    assert "x.frames is damaged or of another version; it is made again" in caplog.text
    assert path.read_bytes() == whole


def test_a_flipped_bit_is_noticed_and_only_that_frame_is_decoded_anew(tmp_path, frames, caplog):
    path = tmp_path / "x.frames"
    mapped(path, frames)
    with path.open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x55")
    back = all_of(mapped(path, frames, refuse), frames)
    assert back[-1] is None and all(a.same_as(b) for a, b in zip(frames[:-1], back[:-1], strict=True))
    assert f"{frames[-1].name} is decoded anew" in caplog.text
    assert not path.exists()


def test_frames_that_cannot_be_read_leave_no_half_a_file(tmp_path, frames):
    def load(index: int) -> Frame:
        if index == 5:
            raise ValueError("broken")
        return frames[index]

    with pytest.raises(ValueError, match="broken"):
        mapped(tmp_path / "x.frames", frames, load)
    assert [path.name for path in tmp_path.iterdir()] == ["x.lock"]


def test_processes_that_want_one_file_at_once_decode_it_once(tmp_path, frames):
    def load(index: int) -> Frame:
        with (tmp_path / "decoded").open("a") as file:
            file.write(f"{index}\n")
        return frames[index]

    def work() -> None:
        assert len(all_of(mapped(tmp_path / "x.frames", frames, load), frames)) == 11

    processes = [multiprocessing.get_context("fork").Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(map(int, (tmp_path / "decoded").read_text().split())) == list(range(11))


def test_changed_files_get_another_cache_file(root, tmp_path):
    shutil.copytree(root / "mfnet", tmp_path / "data" / "mfnet")
    cache = tmp_path / "cache"
    for _ in range(2):
        fresh(tmp_path / "data", cache)[0]
    assert len(list(cache.glob("mf-train-64x96-*.frames"))) == 1
    label = next((tmp_path / "data" / "mfnet" / "labels").glob("train*.png"))
    other = next((tmp_path / "data" / "mfnet" / "labels").glob("val*.png"))
    label.write_bytes(other.read_bytes())
    split = fresh(tmp_path / "data", cache)
    assert len(split) == 11 and np.array_equal(split[0].label, fresh(tmp_path / "data")[0].label)
    assert len(list(cache.glob("*.frames"))) == 2


def test_making_a_cache_file_says_so_in_the_log(root, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fresh(root, tmp_path)[0]
    assert "decoding 11 frames into" in caplog.text
