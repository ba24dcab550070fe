"""One optimiser step: in parts, in other precisions, with averaged weights."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from crm.checkpoint import load_checkpoint, restore, save_checkpoint
from crm.config import Config, override
from crm.data.dataset import open_run_split
from crm.data.loader import make_batch
from crm.data.views import OTHER_SCENES, VIEWS
from crm.machine import Machine
from crm.masking import FILLS, MASKINGS
from crm.model.backbone import drawn_for
from crm.step import RunFailed, Step, Trainer
from tests.tiny import TINY, machine

CONFIG = override(TINY, {"batch": 4, "model.drop_path": 0.3, "model.depths": (1, 2, 1, 1)})
SPLIT = open_run_split(CONFIG.data, "train", None)


def trainer(config: Config = CONFIG, **how) -> Trainer:
    torch.set_num_threads(1)
    made = Trainer(config, machine(Path("nowhere"), **how), SPLIT.spec, epoch_steps=2)
    made.begin()
    return made


def taken(made: Trainer, steps: int = 2) -> list[Step]:
    return [made.step(make_batch(made.config, SPLIT, number), number) for number in range(steps)]


def weights(made: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made.model.named_parameters()}


def distance(one: Trainer, two: Trainer) -> float:
    """Between two networks, relative to how far training moved them."""
    start, first, second = weights(trainer()), weights(one), weights(two)
    apart = sum((first[name] - second[name]).square().sum() for name in first)
    moved = sum((first[name] - start[name]).square().sum() for name in first)
    return (apart / moved).sqrt().item()


@pytest.fixture(scope="module")
def whole() -> tuple[Trainer, list[Step]]:
    made = trainer()
    return made, taken(made)


@pytest.mark.parametrize("how", [{"recompute": True}, {"micro_batch": 4}, {"micro_batch": 9}])
def test_what_only_saves_memory_gives_the_same_bits(how, whole):
    made = trainer(**how)
    assert taken(made) == whole[1]
    expected = weights(whole[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(made).items())


def test_what_is_recomputed_has_the_draws_of_its_part_of_a_batch_whoever_asks_for_it():
    """A GPU's backward pass runs in another thread, which knows nothing of the part."""
    made = trainer()
    branch, found = made.model.backbone.rgb.train(), []
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    for on in (False, True):
        made.model.recompute(on)
        torch.manual_seed(0)
        with drawn_for(2, 2, 4):
            loss = branch(image, None)[-1].square().sum()
        with ThreadPoolExecutor(1) as other:
            found.append(other.submit(torch.autograd.grad, loss, branch.patch_embed.proj.weight).result()[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_are_the_whole_batch_but_for_its_norms(size, whole):
    """With the norms' statistics taken from the running ones, one step's losses are those of the whole batch."""
    made, expected = trainer(micro_batch=size), trainer()
    for each in (made, expected):
        norms = each.model.backbone.fusion_norms
        norms.train = lambda on=True, norms=norms: norms  # stay as they are: frozen
        for norm in norms:
            norm.eval()
    (one,), (two,) = taken(made, 1), taken(expected, 1)
    assert one.terms == pytest.approx(two.terms, rel=1e-4)
    assert one.details == pytest.approx(two.details, rel=1e-4)
    assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-3)
    assert one.hidden == two.hidden


# settings of a step that has more than the published one, for parts of a batch to add up
ALTERNATIVES = {
    "two views": {
        "masking.kind": "none", "masking.view": "cutmix", "loss.complementary": 0.0, "loss.non_local": 0.0,
        "loss.rgb_masked": 1.0, "loss.thermal_masked": 1.0,
    },
    "averaged teacher": {"optim.ema": 0.5, "loss.teacher": "ema", "loss.distillation": "pixel_kl"},
    "corrupted, masked": {"masking.view": "corrupted", "masking.fill": "mean", "masking.overlap": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("case", ALTERNATIVES)
def test_micro_batches_add_up_with_every_alternative(case):
    config = override(CONFIG, ALTERNATIVES[case])
    steps = []
    for size in (3, 0):
        made = trainer(config, micro_batch=size)
        for network in (made.model, made.evaluated):
            norms = network.backbone.fusion_norms
            norms.train = lambda on=True, norms=norms: norms  # stay as they are: frozen
            for norm in norms:
                norm.eval()
        steps.append(taken(made, 2))
    for one, two in zip(*steps, strict=True):
        assert one.terms == pytest.approx(two.terms, rel=1e-3)
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-2)
        assert one.hidden == two.hidden


def test_with_norms_in_training_each_micro_batch_has_statistics_of_its_own(whole):
    (one, *_), (two, *_) = taken(trainer(micro_batch=2)), whole[1]
    assert one.terms["rgb"] == pytest.approx(two.terms["rgb"], rel=1e-4)  # no norm on this path
    assert one.terms["fused"] != pytest.approx(two.terms["fused"], rel=1e-6)


@pytest.mark.parametrize(
    ("how", "tolerance"), [({"channels_last": True}, 1e-3), ({"precision": "bf16"}, 0.1), ({"precision": "tf32"}, 0.0)]
)
def test_other_ways_of_computing_are_near(how, tolerance, whole):
    made = trainer(**how)
    for one, two in zip(taken(made), whole[1], strict=True):
        assert one.terms == pytest.approx(two.terms, rel=tolerance, abs=tolerance)
    assert all(parameter.dtype == torch.float32 for parameter in made.model.parameters())


def test_bf16_does_something(whole):
    assert taken(trainer(precision="bf16"), 1)[0].terms != whole[1][0].terms


@pytest.mark.slow
def test_compiled_parts_compute_the_same():
    """In a process of its own: the compiler would trace the checks of shapes that the tests switch on."""
    code = (
        "import json; from tests.test_step import taken, trainer\n"
        "print(json.dumps([[step.terms for step in taken(trainer(compile=how))] for how in (True, False)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    compiled, plain = json.loads(done.stdout.splitlines()[-1])
    for one, two in zip(compiled, plain, strict=True):
        assert one == pytest.approx(two, rel=1e-3)


# ---------------------------------------------------------------------------------------------- alternatives


def after_one_step(changes: dict) -> Step:
    step = taken(trainer(override(CONFIG, {"loss.points": 32, **changes})), 1)[0]
    assert step.total > 0 and step.grad_norm > 0
    return step


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("kind", [name for name in MASKINGS if name != "none"])
def test_every_masking_trains_and_tells_what_it_hides(kind, fill):
    step = after_one_step({"masking.kind": kind, "masking.fill": fill, "masking.drop": 0.5})
    rgb, thermal, both = (step.hidden[name] for name in ("rgb", "thermal", "both"))
    assert rgb or thermal
    assert max(0.0, rgb + thermal - 1) <= both <= min(rgb, thermal)
    if "complementary" in kind or kind in ("modality_dropout", "rgb_only"):
        assert both == 0.0
    if kind == "identical":
        assert both == rgb == thermal == 0.5


@pytest.mark.parametrize("kind", ["none", "complementary"])
@pytest.mark.parametrize("view", [name for name in VIEWS if name != "clean"])
def test_every_view_trains_with_and_without_masks(view, kind):
    off = {"loss.complementary": 0.0, "loss.non_local": 0.0} if view in OTHER_SCENES else {}
    step = after_one_step({"masking.kind": kind, "masking.view": view, **off})
    assert step.terms["masked"] > 0
    assert step.hidden["rgb"] == (0.5 if kind == "complementary" else 0.0)


def test_a_journal_line_tells_how_much_is_hidden_in_both():
    step = after_one_step({"masking.kind": "complementary", "masking.overlap": 0.5})
    assert step.hidden == {"rgb": 0.5, "thermal": 0.5, "both": 0.25}


# ---------------------------------------------------------------------------------------------- averaged weights


def test_the_average_follows_its_formula():
    config = override(CONFIG, {"optim.ema": 0.8})
    made = trainer(config)
    expected = None
    for number in range(3):
        made.step(make_batch(config, SPLIT, number), number)
        now = weights(made)
        expected = now if expected is None else {name: 0.8 * expected[name] + 0.2 * now[name] for name in now}
    assert made.evaluated is not made.model
    for name, tensor in made.evaluated.named_parameters():
        torch.testing.assert_close(tensor, expected[name])
    for (name, ours), (_, theirs) in zip(made.evaluated.named_buffers(), made.model.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(("teacher", "how"), [("train", {}), ("ema", {}), ("train", {"channels_last": True})])
def test_a_checkpoint_restores_weights_average_and_optimiser(teacher, how, tmp_path):
    config = override(CONFIG, {"optim.ema": 0.8, "loss.teacher": teacher})
    straight = trainer(config, **how)
    taken(straight, 3)
    made = trainer(config, **how)
    taken(made, 2)
    save_checkpoint(tmp_path / "last.safetensors", made, {"step": 2})
    resumed = trainer(config, **how)
    restore(load_checkpoint(tmp_path / "last.safetensors"), resumed)
    resumed.step(make_batch(config, SPLIT, 2), 2)
    for part in ("model", "evaluated"):
        one, two = (getattr(each, part).state_dict() for each in (straight, resumed))
        assert all(torch.equal(one[name], two[name]) for name in one), part


def test_what_is_evaluated_is_what_the_checkpoint_calls_its_weights(tmp_path):
    config = override(CONFIG, {"optim.ema": 0.8})
    made = trainer(config)
    taken(made, 2)
    save_checkpoint(tmp_path / "best.safetensors", made, {"step": 2}, whole=False)
    stored = load_checkpoint(tmp_path / "best.safetensors")
    assert not stored.optimizer and not stored.trained
    average = made.evaluated.state_dict()
    assert all(torch.equal(tensor, average[name]) for name, tensor in stored.weights.items())


# ---------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("how", "hint"),
    [({"precision": "fp16"}, "precision"), ({"head_passes": "batch"}, "Did you mean 'batched'"),
     ({"device": "gpu"}, "cpu, cuda or cuda:N"), ({"micro_batch": -1}, "negative"), ({"threads": 0}, "at least 1")],
)  # fmt: skip
def test_a_machine_that_cannot_be_is_refused(how, hint):
    with pytest.raises(ValueError, match=hint):
        machine(Path("nowhere"), **how)


def test_a_machine_is_written_and_read(tmp_path):
    made = machine(tmp_path, precision="bf16", data=tmp_path / "data", cache=None)
    assert Machine.read(made.written()) == made


def test_a_loss_that_is_not_finite_names_step_and_terms():
    made = trainer(override(CONFIG, {"loss.complementary": 1e39}))
    with pytest.raises(RunFailed, match=r"loss is not finite at step 0: fused .* complementary inf"):
        taken(made, 1)


def test_paths_go_through_the_head_one_by_one_where_a_cpu_cannot_hold_them_together():
    published = {"images": 2, "tokens": 64 * 80, "width": 256}
    small = {"images": 8, "tokens": 16 * 24, "width": 32}
    how = {}
    for device, threads in (("cpu", 1), ("cpu", 3), ("cpu", 4), ("cuda", 4)):
        machine = Machine(runs=Path(), device=device, threads=threads)
        how[device, threads] = [machine.passes_through_head(**maps) for maps in (published, small)]
    one_by_one, shared, together = ["streamed", "batched"], ["threaded", "batched"], ["batched", "batched"]
    assert how == {("cpu", 1): one_by_one, ("cpu", 3): one_by_one, ("cpu", 4): shared, ("cuda", 4): together}
    for how in ({"recompute": True}, {"compile": True}):
        assert Machine(runs=Path(), threads=2, **how).passes_through_head(**published) == "streamed"
    assert Machine(runs=Path(), head_passes="batched").passes_through_head(**published) == "batched"
