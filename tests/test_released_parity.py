"""Our network, objective and optimiser against tensors recorded from the released code.

Every folder with desc.json and weights.safetensors below $CRM_GOLDEN is a case; its README says what the files hold.
The same tests run on cases fabricated here (tests/fabricated_case.py), so that every setting is tried on any machine.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from crm.data.specs import DATASETS
from crm.data.transforms import collate
from crm.objective import objective
from crm.optim import build_optimizer
from crm.weights import load_released, released_name
from tests.conftest import GOLDEN
from tests.fabricated_case import FABRICATED, fabricate
from tests.golden_case import KINDS, MODES, PASSES, Case, each_set_loss, kind, outputs

FOUND = {*GOLDEN.rglob("desc.json"), *GOLDEN.glob("*/desc.json")}  # the second follows links
CASES = sorted(path.parent for path in FOUND if (path.parent / "weights.safetensors").is_file())
EXACT = {"rel": 1e-9, "abs": 1e-12}  # float64 scalars
STORED = {"rtol": 2e-7, "atol": 2e-7}  # float64 results stored as float32


@pytest.fixture(
    scope="module", params=[*(CASES or [None]), *FABRICATED], ids=lambda given: getattr(given, "name", given)
)
def case(request, tmp_path_factory) -> Case:
    if request.param is None:
        pytest.skip(f"no case (desc.json, weights.safetensors) below {GOLDEN}; CRM_GOLDEN names the folder")
    if request.param in FABRICATED:
        return fabricate(tmp_path_factory.mktemp(request.param), **FABRICATED[request.param])
    return Case(request.param)


@pytest.fixture(scope="module")
def exact(case) -> Case:
    """The case in float64."""
    return Case(case.folder, torch.float64)


def compare(case: Case, phase: str, file: str, exactly: bool = False) -> None:
    """Every tensor of a file of outputs with ours; one that we do not know is an error, too."""
    model, recorded = case.model().train(phase == "train"), case.tensors(file)
    ours = outputs(case, model, phase)
    assert not recorded.keys() - ours.keys()
    for name, wanted in recorded.items():
        tolerance = STORED if exactly else {"rtol": 0.0, "atol": case.noise(phase, kind(name))}
        torch.testing.assert_close(
            ours[name], wanted.to(case.dtype), **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_images_are_normalised_and_padded_alike(case):
    spec = DATASETS["mf"]
    assert [*spec.mean, *spec.std] == [*case.settings["PIXEL_MEAN"], *case.settings["PIXEL_STD"]]
    labels = [case.inputs[f"label.{i}"] for i in range(len(case.images))]
    batch = collate(list(zip(case.images, labels, strict=True)), spec)
    torch.testing.assert_close(batch.image, case.tensors("eval")["eval.padded_input"], rtol=0, atol=1e-6)


def test_the_classes_of_an_image_are_those_of_the_recording(case):
    for i, present in enumerate(case.targets.classes):
        assert list(present) == sorted(case.inputs[f"gt_classes.{i}"].tolist())


@pytest.mark.parametrize("phase", ["eval", "train"])
def test_every_output_equals_the_released_one(case, phase):
    compare(case, phase, "eval" if phase == "eval" else "train_forward")


@pytest.mark.parametrize("phase", ["eval", "train"])
def test_every_output_in_float64_equals_the_released_one(exact, phase):
    file = "eval_f64" if phase == "eval" else "train_forward_f64"
    if not exact.has(file):
        pytest.skip(f"{file} is not delivered with {exact.folder.name}")
    compare(exact, phase, file, exactly=True)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_costs_assignments_and_every_loss_term_equal_the_released_ones(case, mode):
    recorded, costs = case.desc["losses"][mode], case.tensors(f"cost_{mode}")
    for name, losses in each_set_loss(case, case.model(), mode).items():
        for output in range(case.outputs):
            layer = f"{PASSES[name]}.{case.layer(output)}"
            for i, present in enumerate(case.targets.classes):
                row = i * case.outputs + output
                order = [present.index(category) for category in case.inputs[f"gt_classes.{i}"].tolist()]
                wanted = costs.get(f"{layer}.{i}", torch.zeros(losses.costs.shape[1], 0))  # queries, targets
                torch.testing.assert_close(losses.costs[row][:, order], wanted, rtol=1e-5, atol=1e-4)
                queries, columns = recorded["indices"][layer][i]
                own = losses.pairs.row == row
                assert losses.pairs.query[own].tolist() == queries
                assert losses.pairs.category[own].tolist() == [present[order[column]] for column in columns]
            for ours, term in zip((losses.classes, losses.masks, losses.dice), KINDS.values(), strict=True):
                wanted = recorded["raw_terms"][f"{layer}.{term}"]
                assert ours[0, output].item() == pytest.approx(wanted, rel=1e-6, abs=case.term_noise(mode))


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_every_loss_term_in_float64_equals_the_released_one(exact, mode):
    recorded = exact.desc["losses"][mode].get("f64") or pytest.skip("no float64 scalars recorded")
    wanted, loss = recorded["weighted_terms_as_returned"], exact.loss
    for name, losses in each_set_loss(exact, exact.model(), mode).items():
        parts = {
            "class": loss.class_weight * losses.classes,
            "mask": loss.mask_weight * losses.masks,
            "dice": loss.dice_weight * losses.dice,
        }
        for part, values in parts.items():
            for output in range(exact.outputs):
                term = exact.term(name, part, output)
                assert values[0, output].item() == pytest.approx(wanted[term], **EXACT), term


def gradients(case: Case, model: nn.Module, mode: str, head_passes: str = "batched") -> dict[str, float]:
    """Leaves the gradient of the total in the model, as a training step does; returns the total and its terms under
    the released names."""
    losses = objective(
        model, case.image, case.hidden, case.targets, case.loss, case.points(mode), head_passes, backward=True
    )
    named = {PASSES.get(name, name): value.item() for name, value in losses.terms.items()}
    return {"total": losses.total.item(), **named}


def wanted_terms(recorded: dict) -> dict[str, float]:
    """The recorded total and terms, those of a pass added up."""
    terms = recorded["weighted_terms_as_returned"]
    sums = {
        name: sum(value for term, value in terms.items() if term.startswith(f"{name}.")) for name in PASSES.values()
    }
    return {"total": recorded["total"], **sums, "complementary": terms["self_comp"], "non_local": terms["self_nlocal"]}


def each_gradient(model: nn.Module, recorded: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, our gradient (0 where none arrives) and the recorded one, of every parameter."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = {id(parameters[released_name(name)]) for name in recorded}
    for name, parameter in model.named_parameters():
        assert id(parameter) in known or parameter.grad is None or not parameter.grad.any(), name
    for name, wanted in recorded.items():
        parameter = parameters[released_name(name)]
        yield name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, wanted


@pytest.mark.parametrize("head_passes", ["batched", "streamed"])
@pytest.mark.parametrize("mode", MODES)
def test_total_every_gradient_and_batch_norm_equal_the_released_ones(case, mode, head_passes):
    model = case.model()
    ours, wanted = gradients(case, model, mode, head_passes), wanted_terms(case.desc["losses"][mode])
    for name, value in ours.items():
        many = 1 if name in ("complementary", "non_local") else 3 * case.outputs  # terms added up
        assert value == pytest.approx(wanted[name], rel=1e-6, abs=many * case.term_noise(mode)), name
    whole, single = case.gradient_noise(mode)
    error = norm = 0.0
    floor = 1e-7 * case.desc["losses"][mode]["total_grad_norm"]  # for gradients that are 0 but for rounding
    for name, own, recorded in each_gradient(model, case.tensors(f"grads_{mode}")):
        off, size = (own - recorded).norm().item(), recorded.norm().item()
        assert off <= single * size + floor, f"{name}: off by {off:.2e} of {size:.2e}"
        error, norm = error + off**2, norm + size**2
    assert error**0.5 <= whole * norm**0.5 + floor
    own = model.state_dict()
    for name, buffer in case.tensors("bn_after_train_forward").items():
        torch.testing.assert_close(own[released_name(name)], buffer, rtol=0, atol=case.noise("train", "res"))


@pytest.mark.parametrize("mode", MODES)
def test_total_and_every_gradient_in_float64_equal_the_released_ones(exact, mode):
    recorded = exact.desc["losses"][mode].get("f64") or pytest.skip("no float64 scalars recorded")
    model = exact.model()
    ours, wanted = gradients(exact, model, mode), wanted_terms(recorded)
    for name, value in ours.items():
        assert value == pytest.approx(wanted[name], **EXACT), name
    stored = exact.tensors(f"grads_{mode}_f64") if exact.has(f"grads_{mode}_f64") else {}
    norms, floor = recorded.get("grad_norms", {}), 1e-12 * exact.desc["losses"][mode]["total_grad_norm"]
    for name, own, gradient in each_gradient(model, exact.tensors(f"grads_{mode}")):
        if name in norms:
            assert own.norm().item() == pytest.approx(norms[name], rel=1e-9, abs=floor), name
        if stored:
            torch.testing.assert_close(own, stored[name].double(), **STORED, msg=f"{name} differs")
        assert own.shape == gradient.shape


def test_weights_after_two_steps_equal_the_released_ones(case):
    """Adam turns the sign noise of a tiny gradient into a step of the learning rate, so every weight is bound by two
    learning rates per step. Those moves are the input of the second step, where they flip a matching or an attention
    mask here or there; so of the weights whose gradient is not tiny, one in a thousand may be off by more than an
    eighth."""
    model, losses = case.model(), case.desc["losses"]
    optimizer = build_optimizer(model, case.optim)
    for total in losses["optim_steps_grid4_total"]:
        optimizer.zero_grad()
        assert gradients(case, model, "grid4")["total"] == pytest.approx(total, rel=1e-5)
        nn.utils.clip_grad_norm_(model.parameters(), case.optim.clip)
        optimizer.step()
    steps = len(losses["optim_steps_grid4_total"])
    rates = {group["name"]: group["lr"] for group in case.desc["param_groups"]}
    first, (_, single), own = case.tensors("grads_grid4"), case.gradient_noise("grid4"), model.state_dict()
    floor = 1e-7 * losses["grid4"]["total_grad_norm"]
    checked = far = 0
    for name, wanted in case.tensors("weights_after_2_steps_grid4").items():
        if (ours := released_name(name)) is None:
            continue
        if name in rates:
            size = first[name].abs()
            tiny = size < single * size.square().mean().sqrt() + floor / size.numel() ** 0.5
            off = (own[ours] - wanted).abs() / rates[name]
            assert (off <= 2 * steps).all(), f"{name}: {off.max():.3f} learning rates"
            checked += (~tiny).sum().item()
            far += (off[~tiny] > steps / 8).sum().item()
        elif "norm_layers" in name:
            torch.testing.assert_close(own[ours], wanted, rtol=1e-5, atol=2 * case.noise("train", "res"))
        else:  # a stage of the thermal branch that is the RGB branch's, and the same tensor here
            assert own[ours].data_ptr() == own[ours.replace(".thermal.", ".rgb.")].data_ptr(), name
    assert far <= checked / 1000, f"{far} of {checked} weights are off by more than {steps / 8} learning rates"


def test_the_optimiser_has_the_released_learning_rates_and_decays(case):
    solver = case.desc["config"]["SOLVER"]
    assert not solver["WEIGHT_DECAY_NORM"]
    assert not solver["WEIGHT_DECAY_EMBED"]
    model = case.model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in build_optimizer(model, case.optim).param_groups
        for parameter in group["params"]
    }
    wanted = {released_name(group["name"]): (group["lr"], group["weight_decay"]) for group in case.desc["param_groups"]}
    assert ours.keys() == wanted.keys()
    for name, values in ours.items():
        assert values == pytest.approx(wanted[name]), name


def test_a_case_with_other_shapes_is_refused_by_name(case):
    model, weights = case.model(), case.tensors("weights")
    weights["sem_seg_head.predictor.class_embed.bias"] = torch.zeros(1000)
    with pytest.raises(ValueError, match=r"query_decoder\.class_embed\.bias"):
        load_released(model, weights)
