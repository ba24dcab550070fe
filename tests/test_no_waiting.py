"""Nothing inside a step waits for a number on the host but the one transfer of the matching costs."""

import torch
from torch.profiler import ProfilerActivity, profile

from crm import objective as objective_module
from crm.points import RandomPoints
from tests.test_objective import LOSS, random, run, tiny
from tests.test_objective import one_thread as one_thread

# what needs a value on the host, and with it, on a GPU, the end of everything that was asked for before
WAITING = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::equal")


def test_forward_and_backward_wait_for_no_number(monkeypatch):
    model, transfers = tiny(), []
    assign = objective_module.assign
    monkeypatch.setattr(objective_module, "assign", lambda *given: transfers.append(1) or assign(*given))
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
