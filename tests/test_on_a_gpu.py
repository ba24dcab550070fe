"""A GPU computes what a CPU does, refuses nothing, and is waited for only where the matching is solved.

Without a GPU this is shown on one in pretence (`tests.pretended_gpu`).
"""

from pathlib import Path

import pytest
import torch

from crm.checkpoint import load_checkpoint, restore, save_checkpoint
from crm.config import override
from crm.data.loader import make_batch
from crm.model.segmenter import build_segmenter
from crm.step import Trainer
from tests.pretended_gpu import GPU, OnGPU, waits
from tests.pretended_gpu import gpu as gpu
from tests.test_step import ALTERNATIVES, CONFIG, SPLIT
from tests.tiny import machine

SETTINGS = {"published": {}, **ALTERNATIVES}


def trainer(config, device: str, **how) -> Trainer:
    torch.set_num_threads(1)
    made = Trainer(config, machine(Path("nowhere"), device=device, head_passes="batched", **how), SPLIT.spec, 2)
    made.begin()
    return made


def steps(made: Trainer) -> list:
    return [made.step(make_batch(made.config, SPLIT, number), number) for number in range(2)]


def test_a_tensor_of_the_host_is_refused(gpu):
    with pytest.raises(RuntimeError, match="one device"):
        torch.ones(3, device="cuda") + torch.ones(3)
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(3, device="cuda").numpy()


def test_a_wait_is_noted(gpu):
    with waits() as found:
        x = torch.ones(3).pin_memory().to("cuda")
        assert x.device == GPU and found == []
        assert x.sum().item() == 3.0
        torch.ones(3).to("cuda", non_blocking=True)
        x.tolist()
    assert len(found) == 3


HOW = {"whole": {}, "in parts": {"micro_batch": 2}, "recomputed": {"recompute": True}, "bf16": {"precision": "bf16"}}


@pytest.mark.parametrize(("case", "how"), [*((case, "whole") for case in SETTINGS), *(("published", how) for how in HOW)])
def test_a_step_computes_what_a_cpu_does(case, how, request):
    config = override(CONFIG, SETTINGS[case])
    expected, start = trainer(config, "cpu", **HOW[how]), trainer(config, "cpu")
    of_cpu = steps(expected)
    request.getfixturevalue("gpu")
    made = trainer(config, "cuda", **HOW[how])
    assert all(parameter.device == GPU for parameter in made.model.parameters())
    for one, two in zip(steps(made), of_cpu, strict=True):
        assert one.terms == pytest.approx(two.terms, rel=0.05 if how == "bf16" else 1e-4)
        assert one.hidden == two.hidden
    


def test_a_checkpoint_goes_on_there(tmp_path, gpu):
    config = override(CONFIG, {"optim.ema": 0.5})
    straight, made = trainer(config, "cuda"), trainer(config, "cuda")
    steps(straight)
    made.step(make_batch(config, SPLIT, 0), 0)
    save_checkpoint(tmp_path / "last.safetensors", made, {"step": 1})
    resumed = trainer(config, "cuda")
    restore(load_checkpoint(tmp_path / "last.safetensors"), resumed)
    resumed.step(make_batch(config, SPLIT, 1), 1)
    one, two = straight.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("case", SETTINGS)
def test_a_step_waits_for_the_matching_alone(case, gpu):
    config = override(CONFIG, SETTINGS[case])
    made = trainer(config, "cuda")
    made.advance(make_batch(config, SPLIT, 0), 0)  # what is cached is cached
    batch = make_batch(config, SPLIT, 1)
    with waits() as found:
        made.advance(batch, 1)
    matchings = 1 if config.masking.view == "clean" else 2  # of a view with labels of its own
    assert found == ["matching.py: copy to the host"] * matchings
