"""A step whose threads have images of their own, against the same step in one thread."""

import os
from pathlib import Path

import pytest
import torch

from crm.config import Config, override
from crm.machine import Machine
from crm.model.segmenter import build_segmenter
from crm.replicas import Replicas, Share
from tests.test_step import ALTERNATIVES, CONFIG, taken, trainer, weights


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_threads(threads: int, config: Config = CONFIG):
    made = trainer(config, threads=threads, head_passes="threaded")
    torch.set_num_threads(threads)
    return made


def network():
    return build_segmenter(CONFIG.model, 4)


@pytest.mark.parametrize(
    ("images", "threads", "sizes"),
    [(2, 2, [1, 1]), (8, 16, [1] * 8), (6, 4, [3, 3]), (4, 2, [2, 2]), (3, 2, [3]), (2, 1, [2])],
)
def test_shares_have_equally_many_images_and_threads(images, threads, sizes):
    torch.set_num_threads(threads)
    replicas = Replicas(network(), images, threaded=True)
    assert [share.images.stop - share.images.start for share in replicas.shares] == sizes
    assert [share.images.start for share in replicas.shares] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert replicas.each(lambda share: torch.get_num_threads()) == [threads // len(sizes)] * len(sizes)
    assert torch.get_num_threads() == threads


def test_a_replica_has_the_weights_the_mode_and_the_buffers_and_gradients_of_its_own():
    torch.set_num_threads(2)
    model = network().train()
    model.backbone.fusion_norms.eval()
    model.half_precision(True)
    _, other = (share.model for share in Replicas(model, 2, threaded=True).shares)
    assert not {id(part) for part in model.modules()} & {id(part) for part in other.modules()}
    for (name, one), (same, two) in zip(model.named_modules(), other.named_modules(), strict=True):
        assert (name, type(one), one.training) == (same, type(two), two.training)
    assert other.pixel_decoder.follows_autocast
    tensors = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(name == same and one.data_ptr() == two.data_ptr() for (name, one), (same, two) in tensors)
    next(other.parameters()).grad = torch.zeros_like(next(other.parameters()))
    assert next(model.parameters()).grad is None


def test_a_replica_of_shared_stages_shares_them():
    torch.set_num_threads(2)
    model = build_segmenter(override(CONFIG, {"model.share_from": 2}).model, 4)
    _, other = (share.model for share in Replicas(model, 2, threaded=True).shares)
    rgb, thermal = other.backbone.rgb.stages, other.backbone.thermal.stages
    assert [rgb[i] is thermal[i] for i in range(4)] == [False, False, True, True]
    assert len(list(other.parameters())) == len(list(model.parameters()))


def test_gradients_are_added_in_the_order_of_the_shares_to_those_that_are_there():
    torch.set_num_threads(2)
    model = network()
    parameter = next(model.parameters())
    parameter.grad = torch.full_like(parameter, 0.5)
    replicas = Replicas(model, 2, threaded=True)

    def work(share: Share) -> int:
        (next(share.model.parameters()).sum() * 10.0**share.number).backward()
        return share.number

    assert replicas.each(work) == [0, 1]
    assert parameter.grad.unique().tolist() == [11.5]
    assert all(one.grad is None for one in replicas.shares[1].model.parameters())


def test_what_a_share_raises_is_raised_when_all_have_ended():
    torch.set_num_threads(2)
    ended = []

    def work(share: Share) -> None:
        if share.number == 0:
            raise FloatingPointError("nan")
        ended.append(share.number)

    with pytest.raises(FloatingPointError, match="nan"):
        Replicas(network(), 2, threaded=True).each(work)
    assert ended == [1] and torch.get_num_threads() == 2


def test_shares_are_under_the_autocast_of_the_caller():
    torch.set_num_threads(2)
    replicas = Replicas(network(), 2, threaded=True)
    a = torch.ones(2, 2)
    assert replicas.each(lambda share: (a @ a).dtype) == [torch.float32] * 2
    for half in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", half):
            assert replicas.each(lambda share: (a @ a).dtype) == [half] * 2


def test_a_forked_process_has_threads_of_its_own():
    torch.set_num_threads(2)
    replicas = Replicas(network(), 2, threaded=True)
    assert replicas.each(lambda share: share.number) == [0, 1]
    if (child := os.fork()) == 0:
        os._exit(7 if replicas.each(lambda share: share.number) == [0, 1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("case", [*ALTERNATIVES, "published"])
@pytest.mark.parametrize("threads", [2, 4])
def test_steps_in_threads_are_those_of_one_thread(case, threads):
    """The norms of the fusion see the whole batch, and stochastic depth and points are drawn for it."""
    config = override(CONFIG, ALTERNATIVES.get(case, {}))
    whole, made = trainer(config, head_passes="streamed"), in_threads(threads, config)
    for one, two in zip(taken(whole), taken(made), strict=True):
        assert two.terms == pytest.approx(one.terms, rel=1e-3)
        assert two.details == pytest.approx(one.details, rel=1e-3)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-2)
        assert two.hidden == one.hidden
    for (name, one), two in zip(whole.model.named_buffers(), made.model.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=name)


def test_steps_in_threads_have_the_same_bits_every_time():
    one, two = in_threads(2), in_threads(2)
    assert taken(one, 3) == taken(two, 3)
    expected = weights(one)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(two).items())


@pytest.mark.parametrize("how", [{"device": "cuda"}, {"recompute": True}, {"compile": True}])
def test_threads_for_images_are_refused_where_they_cannot_be(how):
    with pytest.raises(ValueError, match="threaded is for the device cpu"):
        Machine(runs=Path(), head_passes="threaded", **how)
