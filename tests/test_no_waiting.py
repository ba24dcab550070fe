"""Nothing inside a step waits for a number on the host but the one transfer of the matching costs."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from crm import set_losses
from crm.config import override
from crm.data.loader import make_batch
from crm.distributed import world
from crm.model import query_decoder
from crm.points import RandomPoints
from crm.records import claim, journal, open_run
from crm.step import RunFailed, Trainer
from crm.train import train
from tests.test_objective import LOSS, random, run, tiny
from tests.test_objective import one_thread as one_thread
from tests.test_step import CONFIG, SPLIT, trainer
from tests.tiny import machine

# what needs a value on the host, and with it, on a GPU, the end of everything that was asked for before
# (the gradient of masks asks on a CPU alone which of them have one: `on_gpu` has the product that is made elsewhere)
WAITING = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::equal")


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(query_decoder, "mask_product", torch.matmul)


def test_forward_and_backward_wait_for_no_number(monkeypatch, on_gpu):
    model, transfers = tiny(), []
    assign = set_losses.assign
    monkeypatch.setattr(set_losses, "assign", lambda *given: transfers.append(1) or assign(*given))
    points = RandomPoints(random())
    run(model, LOSS, points=points).total.backward()  # what is cached is cached
    transfers.clear()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run(model, LOSS, points=points).total.backward()
    names = [event.name for event in seen.events() or ()]
    assert "aten::embedding_bag" in names and "aten::bmm" in names  # the profiler has seen the step
    assert {name: names.count(name) for name in WAITING if name in names} == {}
    assert len(transfers) == 1  # for every pass, image and decoder output together


def test_an_unwanted_wait_would_be_seen():
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        torch.ones(3).sum().item()
    assert "aten::_local_scalar_dense" in [event.name for event in seen.events() or ()]


@pytest.mark.parametrize(("ema", "micro_batch"), [(0.0, 0), (0.9, 2)])
def test_a_whole_training_step_waits_for_no_number_either(ema, micro_batch, monkeypatch, on_gpu):
    made, transfers = trainer(override(CONFIG, {"optim.ema": ema}), micro_batch=micro_batch), []
    assign = set_losses.assign
    monkeypatch.setattr(set_losses, "assign", lambda *given: transfers.append(1) or assign(*given))
    batch = make_batch(made.config, SPLIT, 0)
    made.advance(batch, 0)
    transfers.clear()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        taken = made.advance(batch, 1)
    names = [event.name for event in seen.events() or ()]
    # Numbers that were never on the device: classes of the labels, an image at a time and two in all; the counter of
    # each tensor, which AdamW's kernel for CPUs reads, not the one for GPUs; the counter of the average.
    moved = sum(parameter.grad is not None for parameter in made.model.parameters())
    assert names.count("aten::nonzero") <= CONFIG.batch + 1
    assert names.count("aten::_local_scalar_dense") <= moved + 2 + (2 if ema else 0)
    assert not {"aten::masked_select", "aten::equal"} & set(names)
    assert len(transfers) == (2 if micro_batch else 1)  # assignments are solved on the host, once for each part
    assert len(made.unchecked) == 2  # nobody has looked
    assert taken.step.total > 0


@pytest.mark.gpu
def test_on_a_gpu_a_step_synchronises_for_labels_on_their_way_there_and_for_the_matching_alone():
    made = trainer(device="cuda")
    batch = make_batch(made.config, SPLIT, 0)
    made.advance(batch, 0)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as said:
            made.advance(batch, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {Path(one.filename).name for one in said} <= {"matching.py", "targets.py"}


def test_a_loss_that_is_not_finite_is_found_late_and_named_with_its_own_step(tmp_path, monkeypatch):
    # It spoils the weights, but nothing is made of them: no line, no validation, no checkpoint.
    config = override(CONFIG, {"steps": 8, "val_every": 0})
    broken = 3

    advance = Trainer.advance

    def spoilt(self, batch, number):
        taken = advance(self, batch, number)
        if number == broken:
            taken._values[0] = torch.nan
        return taken

    monkeypatch.setattr(Trainer, "advance", spoilt)
    folder = open_run(tmp_path, config)
    mine = claim(folder, "t")
    assert mine is not None and world().size == 1
    told = []
    how = {"log_every": 5, "checkpoint_every": 5}
    with pytest.raises(RunFailed, match=f"the loss is not finite at step {broken}: fused nan, rgb [0-9.]+"):
        train(config, machine(tmp_path, **how), mine, lambda: False, told.append)
    assert [progress.step for progress in told] == [1, 2, 3, 4]  # found where line 5 would have been written
    assert not [line for line in journal(folder) if line["event"] == "train"]
    assert not list(Path(folder, "checkpoints").glob("*"))


def test_weights_that_a_step_has_spoilt_are_not_blamed_on_the_next():
    made = trainer()
    made.advance(make_batch(CONFIG, SPLIT, 0), 0)._values[0] = torch.inf
    with torch.no_grad():
        for tensor in made.model.parameters():
            tensor.fill_(torch.nan)
    with pytest.raises(RunFailed, match="the loss is not finite at step 0: fused inf"):
        made.advance(make_batch(CONFIG, SPLIT, 1), 1)
