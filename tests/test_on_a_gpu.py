"""A GPU computes what a CPU does, refuses nothing, and is waited for only where the matching is solved.

Without a GPU this is shown on one in pretence (`tests.pretended_gpu`).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import step
from benchmarks.passes import SMALL
from crm.checkpoint import load_checkpoint, restore, save_checkpoint
from crm.conditions import CLEAN_TEST, MISSING, suite
from crm.config import Config, override
from crm.confusion import load_evaluation
from crm.data.dataset import open_run_split
from crm.data.loader import make_batch
from crm.diagnose import diagnose
from crm.distributed import World, own_gpu
from crm.evaluate import evaluate
from crm.overhead import measure
from crm.predict import load_network, predict
from crm.records import evaluation, open_run, record_numerics, recorded_numerics
from crm.smoke import smoke
from crm.step import Step, Trainer
from crm.verify import verified_images
from crm.worker import DONE, STOPPED, attempt
from tests.pretended_gpu import GPU, waits
from tests.pretended_gpu import gpu as gpu
from tests.test_combinations import BASE, design, made, refusal
from tests.test_step import ALTERNATIVES, CONFIG, SPLIT
from tests.tiny import TINY, machine

SETTINGS = {"published": {}, **ALTERNATIVES}
HOW = {"in parts": {"micro_batch": 2}, "recomputed": {"recompute": True}, "bf16": {"precision": "bf16"}}
TOGETHER = {"head_passes": "batched"}  # as on a GPU


def trainer(config: Config, device: str, **how) -> Trainer:
    torch.set_num_threads(1)
    found = Trainer(config, machine(Path("nowhere"), device=device, **how), SPLIT.spec, epoch_steps=2)
    found.begin()
    return found


def steps(found: Trainer, count: int = 2) -> list[Step]:
    return [found.step(make_batch(found.config, SPLIT, number), number) for number in range(count)]


def on_host(found: Trainer) -> dict[str, np.ndarray]:
    return {name: tensor.cpu().numpy() for name, tensor in found.model.state_dict().items()}


# ---------------------------------------------------------------------------------------------- the pretence


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
        x[x > 0]
        x[[0, 1]]
    assert len(found) == 5


# ---------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize(
    ("case", "how"),
    [
        *(("published", how) for how in ({}, *HOW.values())),
        *(pytest.param(case, {}, marks=pytest.mark.slow) for case in ALTERNATIVES),
    ],
    ids=str,
)
def test_a_step_computes_what_a_cpu_does(case, how, request):
    config, rough = override(CONFIG, SETTINGS[case]), "precision" in how
    expected = trainer(config, "cpu", **TOGETHER, **how)
    start, of_cpu, after = on_host(trainer(config, "cpu")), steps(expected), on_host(expected)
    request.getfixturevalue("gpu")
    found = trainer(config, "cuda", **how)
    assert all(parameter.device == GPU for parameter in found.model.parameters())
    for one, two in zip(steps(found), of_cpu, strict=True):
        assert one.terms == pytest.approx(two.terms, rel=0.05 if rough else 1e-4)
        assert one.hidden == two.hidden
    ours = on_host(found)
    apart, moved = (sum(np.square(ours[name] - x[name]).sum() for name in ours) for x in (after, start))
    assert apart < (0.3 if rough else 0.02) * moved


@pytest.mark.parametrize("case", SETTINGS)
def test_a_step_waits_for_the_matching_alone(case, gpu):
    config = override(CONFIG, SETTINGS[case])
    found = trainer(config, "cuda")
    found.advance(make_batch(config, SPLIT, 0), 0)  # what is cached is cached
    batch = make_batch(config, SPLIT, 1)
    with waits() as seen:
        found.advance(batch, 1)
    matchings = 1 if config.masking.view == "clean" else 2  # of a view with labels of its own
    assert seen == ["matching.py: copy to the host"] * matchings


def test_a_checkpoint_goes_on_there(tmp_path, gpu):
    config = override(CONFIG, {"optim.ema": 0.5})
    straight, begun = trainer(config, "cuda"), trainer(config, "cuda")
    steps(straight)
    steps(begun, 1)
    save_checkpoint(tmp_path / "last.safetensors", begun, {"step": 1})
    resumed = trainer(config, "cuda")
    restore(load_checkpoint(tmp_path / "last.safetensors"), resumed)
    resumed.step(make_batch(config, SPLIT, 1), 1)
    one, two = on_host(straight), on_host(resumed)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def covering() -> list[dict[str, str]]:
    """Choices in which every alternative occurs, but for what training starts from."""
    found, seen = [], set()
    for choice in ({**one, "start": "scratch"} for one in design()[0]):
        if not seen.issuperset(choice.items()) and not refusal(choice):
            found.append(choice)
            seen.update(choice.items())
    return found


@pytest.mark.slow
def test_every_alternative_trains_and_is_evaluated_there(request):
    configs = [made(choice) for choice in covering()]
    train, test = (open_run_split(BASE.data, name, None) for name in ("train", "test"))

    def carried_out(config: Config, device: str) -> tuple[dict[str, float], list[np.ndarray]]:
        # of late fusion, each network has the queries of the images that it sees
        how = {} if device == "cuda" or config.model.inputs == "late" else TOGETHER
        network = trainer(config, device, **how)
        scored = evaluate(network.model.eval(), test.only(range(1)), [CLEAN_TEST, *MISSING], 1, device)
        matrices = [found.confusion for _, found in scored]
        return network.step(make_batch(config, train, 0), 0).terms, matrices

    expected = [carried_out(config, "cpu") for config in configs]
    request.getfixturevalue("gpu")
    for config, (terms, matrices) in zip(configs, expected, strict=True):
        found, ours = carried_out(config, "cuda")
        assert found == pytest.approx(terms, rel=1e-3), config
        for one, two in zip(ours, matrices, strict=True):
            assert np.abs(one - two).sum() < 0.01 * two.sum(), config


# ---------------------------------------------------------------------------------------------- a run


def ended(folder: Path, device: str, stop: int | None = None) -> int:
    """How an attempt ends that is asked to stop after so many steps."""
    asked = iter(range(10_000))
    return attempt(folder, machine(folder.parent, device=device), f"until-{stop}", "last", suite("missing"),
                   lambda: stop is not None and next(asked) >= stop, lambda told: None)  # fmt: skip


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_numbers_of_one_that_was_not(tmp_path, gpu, monkeypatch):
    monkeypatch.setattr("crm.system.EVERY", 0.0)
    straight, stopped = (open_run(tmp_path / name, TINY) for name in ("straight", "stopped"))
    assert ended(straight, "cuda") == DONE
    assert ended(stopped, "cuda", stop=3) == STOPPED
    assert ended(stopped, "cuda") == DONE
    for one in suite("missing"):
        ours, theirs = (load_evaluation(evaluation(folder, "last", one)) for folder in (straight, stopped))
        assert np.array_equal(ours.confusion, theirs.confusion)
    hardware = json.loads((straight / "provenance.json").read_text())["hardware"]
    assert (hardware["device"], hardware["gpu"]) == ("cuda", "a GPU in pretence")
    assert '"gpu_memory_gib": 1.0' in (straight / "journal.jsonl").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = open_run(tmp_path_factory.mktemp("home") / "runs", TINY)
    assert ended(folder, "cpu") == DONE
    return folder


def test_a_diagnosis_is_that_of_a_cpu(trained, request):
    def diagnosed(device: str):
        return diagnose(trained, machine(trained.parent, device=device), selection="last", split_name=None,
                        images=None, draws=2, tell=lambda done, parts: None).measures  # fmt: skip

    of_cpu = diagnosed("cpu")
    request.getfixturevalue("gpu")
    found = diagnosed("cuda")
    assert (found.clean, found.missing) == (of_cpu.clean, of_cpu.missing)
    assert found.gradient == pytest.approx(of_cpu.gradient, rel=1e-3)


def test_a_picture_has_the_classes_that_a_cpu_finds(trained, request):
    frame = open_run_split(TINY.data, "test", None)[0]
    expected = predict(*load_network(trained, "last", "cpu"), frame, None, "cpu")
    request.getfixturevalue("gpu")
    assert np.array_equal(predict(*load_network(trained, "last", "cuda"), frame, None, "cuda"), expected)


def test_what_it_evaluated_is_verified_there(trained, gpu):
    names = [f"last/{one.name}" for one in suite("missing")]
    found = verified_images(trained, names, 2, None, "cuda")
    assert (found.evaluations, found.differing) == (len(names), 0)


def test_what_a_network_costs_is_measured_and_a_smoke_test_passes(trained, gpu, monkeypatch):
    for name in ("STEPS", "IMAGES"):
        monkeypatch.setattr(f"crm.overhead.{name}", 1)
    found = measure(trained, machine(trained.parent, device="cuda"))
    assert found["device"] == "cuda" and found["training_bytes"] == 2**30 and found["step_seconds"] > 0
    smoke(TINY, machine(trained.parent, device="cuda"))


@pytest.mark.slow
def test_its_step_is_measured_beside_the_released_one(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(step, "CONFIG", override(step.CONFIG, SMALL))
    monkeypatch.setattr(step, "SETTLING", 1)
    monkeypatch.setattr(step, "SIDES", {"cuda": 64})
    monkeypatch.setattr(step, "peak_of", lambda part, side, given: 2**30)  # another process, without this GPU
    monkeypatch.setattr(step, "seconds_of_both", lambda *given: (1e-3, 2e-3))  # by a kernel
    file = tmp_path / "found.json"
    monkeypatch.setattr(
        "sys.argv", ["step", "--device", "cuda", "--part", "step", "--rounds", "1", "--json", str(file)]
    )
    step.main()
    found = json.loads(file.read_text())
    assert (found["gpu"], found["sampling"]["ratio"]) == ("a GPU in pretence", 0.5)
    assert found["step"]["losses_apart"] < 1e-3 and found["step_bf16"]["losses_apart"] < 0.05
    assert "a GPU in pretence" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- several of them


def test_processes_of_a_run_take_a_gpu_each():
    of_torchrun = [own_gpu("cuda", World(rank, 4, rank), count=4) for rank in range(4)]
    assert of_torchrun == [0, 1, 2, 3]
    each_sees_its_own = [own_gpu("cuda", World(rank, 2, rank), count=1) for rank in range(2)]
    assert each_sees_its_own == [0, 0]
    with pytest.raises(ValueError, match="--device cuda, not cuda:1"):
        own_gpu("cuda:1", World(0, 2), count=2)


def test_where_memory_was_short_for_training_no_more_images_are_evaluated_at_once():
    how = {(device, micro): machine(Path("nowhere"), device=device, micro_batch=micro).at_once(16)
           for device in ("cpu", "cuda") for micro in (0, 4)}  # fmt: skip
    assert how == {("cpu", 0): 16, ("cpu", 4): 16, ("cuda", 0): 16, ("cuda", 4): 4}


def test_which_gpu_it_was_is_no_part_of_a_runs_numerics(tmp_path):
    folder = open_run(tmp_path, TINY)
    record_numerics(folder, machine(tmp_path, device="cuda:1"))
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "last.safetensors").touch()
    assert recorded_numerics(folder, machine(tmp_path, device="cuda")).device == "cuda"
    assert recorded_numerics(folder, machine(tmp_path)).device == "cuda"  # another kind: that of the first attempt


def test_tf32_is_for_training_alone(gpu):
    allowed = []
    found = trainer(CONFIG, "cuda", precision="tf32")
    found.model.pixel_decoder.register_forward_pre_hook(lambda *given: allowed.append(both()))
    steps(found, 1)
    assert allowed and all(one == (True, True) for one in allowed)
    assert both() == (False, False)


def both() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_a_gpu_that_is_not_there_is_refused(gpu):
    with pytest.raises(ValueError, match="no cuda:1: PyTorch finds 1 GPU here"):
        machine(Path("nowhere"), device="cuda:1").take_process()
