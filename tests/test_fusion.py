"""Fusions, the controls beside them and the norms after them: one contract for all, and each definition by itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from crm.checkpoint import load_checkpoint, restore, save_checkpoint
from crm.conditions import SUITES
from crm.config import Config, Model, override
from crm.data.dataset import open_run_split
from crm.data.loader import make_batch
from crm.diagnose import diagnose
from crm.evaluate import evaluate
from crm.model.fusion import EXCHANGED, FUSIONS, Fusion, Level
from crm.model.norm import FUSION_NORMS, BatchNorm
from crm.model.query_decoder import QueryDecoder
from crm.model.segmenter import INPUTS, Segmenter, build_segmenter, semantic_scores
from crm.optim import build_optimizer
from crm.records import open_run
from crm.step import Step, Trainer
from crm.worker import DONE, attempt
from tests.test_model import TINY as SIZES
from tests.test_model import image
from tests.tiny import TINY, machine

# whether exchanging the modalities changes nothing
SYMMETRIC = {
    "max": True, "add": True, "average": True,
    "concat": False, "gated": False, "frm_ffm": False, "token_exchange": False,
}  # fmt: skip

ALONE = {f"loss.{name}": 0.0 for name in ("rgb", "thermal", "masked", "complementary", "non_local")}
ALONE |= {"masking.kind": "none"}
CONTROLS = {name: ALONE | {"model.inputs": name} for name in ("rgb", "thermal", "early")}
CONTROLS["late"] = ALONE | {"model.inputs": "late", "loss.fused": 0.0, "loss.rgb": 1.0, "loss.thermal": 1.0}

# every network there is: the fusions under the whole method, the controls as they are trained
NETWORKS = {name: {"model.fusion": name} for name in FUSIONS} | CONTROLS
CONFIG = override(TINY, {"model.drop_path": 0.0})
SPLIT = open_run_split(CONFIG.data, "train", None)


def test_the_contract_covers_every_fusion_and_every_control():
    assert NETWORKS.keys() == FUSIONS.keys() | (INPUTS.keys() - {"both"})


def trainer(changes: dict, **how) -> Trainer:
    torch.set_num_threads(1)
    made = Trainer(override(CONFIG, changes), machine(Path("nowhere"), **how), SPLIT.spec, epoch_steps=2)
    made.begin()
    return made


def step(made: Trainer, number: int = 0) -> Step:
    return made.step(make_batch(made.config, SPLIT, number), number)


def network(**changes) -> Segmenter:
    torch.manual_seed(0)
    return build_segmenter(Model(**{**SIZES, **changes}), num_classes=3)


def evaluated(changes: dict) -> dict[str, np.ndarray]:
    """Per-image matrices of a network whose queries disagree about the class, by condition, without either modality."""
    model = trainer(changes).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for decoder in (module for module in model.modules() if isinstance(module, QueryDecoder)):
            for part in (decoder.query_feat, decoder.query_embed, decoder.class_embed):
                part.weight.normal_(generator=generator)
            decoder.class_embed.bias.zero_()[-1] = -5.0  # no query stays without a class
            for part in decoder.mask_embed[::2]:
                part.weight.normal_(std=0.5, generator=generator)
    found = evaluate(model, SPLIT.only(range(3)), SUITES["missing"], 2, "cpu")
    return {condition.name: result.confusion for condition, result in found}


def level(name: str, channels: int = 8) -> Fusion:
    """One level of a fusion; what starts at 0 or 1 has other values, so that it shows."""
    torch.manual_seed(0)
    made = FUSIONS[name](Level(channels, 2, lambda wide: BatchNorm(wide, sync=False), sparsity=0.5))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


def two(channels: int = 8, height: int = 3, width: int = 5) -> tuple[Tensor, Tensor]:
    """Maps of both modalities."""
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(2, 2, channels, height, width, generator=generator)
    return first, second


# ---------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("head_passes", ["batched", "streamed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_is_finite_and_reaches_every_parameter(name, head_passes):
    made = trainer(NETWORKS[name], head_passes=head_passes)
    done = step(made)
    assert np.isfinite([*done.terms.values(), *done.details.values(), done.grad_norm]).all()
    unmoved = [path for path, parameter in made.model.named_parameters() if not _moves(parameter)]
    # the offsets do not depend on it before their first step (released code); without masks nothing has a mask token
    unused = ("pixel_decoder.level_embed", "pixel_decoder_thermal.level_embed")
    unused += ("mask_token",) if name in CONTROLS else ()
    assert [path for path in unmoved if not path.endswith(unused)] == []


def _moves(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_passes_together_or_one_by_one_and_micro_batches_give_the_same_losses(name):
    """With micro-batches BatchNorm sees each alone, so its statistics are frozen for that comparison."""
    together, streamed, parts, whole = (
        trainer(NETWORKS[name], **how) for how in ({}, {"head_passes": "streamed"}, {"micro_batch": 1}, {})
    )
    for each in (parts, whole):
        for module in each.model.modules():
            if isinstance(module, BatchNorm):
                module.train = lambda on=True, module=module: module
                module.training = False
    assert step(streamed).terms == pytest.approx(step(together).terms, rel=2e-3)
    one, two = step(parts), step(whole)
    assert one.terms == pytest.approx(two.terms, rel=1e-3)
    assert one.details == pytest.approx(two.details, rel=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_repeats_and_counts_every_pixel_also_without_a_modality(name):
    found, again = evaluated(NETWORKS[name]), evaluated(NETWORKS[name])
    assert found.keys() == {condition.name for condition in SUITES["missing"]}
    for condition, matrix in found.items():
        assert (matrix.sum(axis=(1, 2)) == 64 * 96).all()
        assert np.array_equal(matrix, again[condition]), condition
        other = {"rgb": "thermal=", "thermal": "rgb="}.get(name)  # the modality that a network of one does not have
        same = np.array_equal(matrix, found["test"])
        assert same == (condition == "test" or (other is not None and other in condition)), condition


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_can_be_diagnosed(name, tmp_path):
    """What is found asks for nothing that the control cannot have, and queries are counted as there are."""
    config = override(CONFIG, {**NETWORKS[name], "steps": 1, "val_every": 0})
    folder = open_run(tmp_path, config)
    assert attempt(folder, machine(tmp_path), "token", "last", [], lambda: False, lambda told: None) == DONE
    found = diagnose(folder, machine(tmp_path), "last", None, 2, 1, lambda done, total: None).measures
    assert found.queries == (24 if name == "late" else 12) and found.dead >= 0
    assert found.gradient["head"] > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_a_checkpoint_brings_every_bit_back(name, tmp_path):
    made, other = trainer(NETWORKS[name]), trainer({**NETWORKS[name], "seed": 1})
    step(made)
    save_checkpoint(tmp_path / "last.safetensors", made, {"step": 1})
    restore(load_checkpoint(tmp_path / "last.safetensors"), other)
    ours, theirs = made.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[path], theirs[path]) for path in ours)
    assert other.optimizer.state.keys() == set(other.model.parameters()) - {
        parameter for path, parameter in other.model.named_parameters()
        if path.endswith("mask_token") and name in CONTROLS
    }  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_seed_decides_all_initial_values(name):
    changes = {
        path.removeprefix("model."): value for path, value in NETWORKS[name].items() if path.startswith("model.")
    }
    one, two = network(**changes).state_dict(), network(**changes).state_dict()
    assert all(torch.equal(one[path], two[path]) for path in one)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("height", "width"), [(32, 64), (96, 32)])
def test_any_image_size_gives_scores_of_that_size(name, height, width):
    changes = {
        path.removeprefix("model."): value for path, value in NETWORKS[name].items() if path.startswith("model.")
    }
    model = network(**changes).eval()
    assert semantic_scores(model(image(height, width)), (height, width)).shape == (2, 3, height, width)


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_fusion_keeps_the_shape_and_passes_a_gradient_to_both(name, masked):
    maps = [x.requires_grad_() for x in two()]
    seen = torch.rand(2, 2, 3, 5, generator=torch.Generator().manual_seed(0)) if masked else None
    made = level(name).train()
    fused = made(*maps, seen, masked)
    assert fused.shape == maps[0].shape
    fused.square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in maps)


@pytest.mark.parametrize("name", FUSIONS)
def test_everything_but_the_fusion_starts_from_the_same_values(name):
    ours, theirs = network(fusion=name).state_dict(), network().state_dict()
    assert [path for path in theirs if not torch.equal(ours[path], theirs[path])] == []
    assert all(path.startswith("backbone.fusion.") for path in ours.keys() - theirs.keys())


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("share_from", [0, 2])
def test_fusions_work_over_shared_stages_and_in_bfloat16(name, share_from):
    made = trainer({"model.fusion": name, "model.share_from": share_from}, precision="bf16")
    assert np.isfinite(list(step(made).terms.values())).all()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps = made.model.features(image(64, 96)).fused
    assert {level.dtype for level in maps} == {torch.float32}


@pytest.mark.parametrize("name", FUSIONS)
def test_what_a_fusion_learns_has_the_rate_of_the_head_and_its_norms_that_of_the_backbone(name):
    model = network(fusion=name)
    rates = {
        id(parameter): group["lr"]
        for group in build_optimizer(model, Config().optim).param_groups
        for parameter in group["params"]
    }
    assert all(rates[id(parameter)] == 1e-4 for parameter in model.backbone.fusion.parameters())
    assert all(rates[id(parameter)] == pytest.approx(1e-5) for parameter in model.backbone.fusion_norms.parameters())


def test_norms_inside_a_fusion_are_those_of_the_network():
    model = network(fusion="frm_ffm", sync_norm=False, fusion_norm="frozen")
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 8
    assert all(norm.sync is False and norm.how == "frozen" for norm in norms)


# ---------------------------------------------------------------------------------------------- definitions


@torch.no_grad()
@pytest.mark.parametrize("name", SYMMETRIC)
def test_a_fusion_is_symmetric_just_where_it_says_so(name):
    rgb, thermal = two()
    made = level(name)
    same = torch.allclose(made(rgb, thermal, None, False), made(thermal, rgb, None, False), atol=1e-6)
    assert same == SYMMETRIC[name]


@torch.no_grad()
def test_max_add_and_concat_are_what_they_say():
    rgb, thermal = two()
    assert torch.equal(level("max")(rgb, thermal, None, False), torch.where(rgb > thermal, rgb, thermal))
    assert torch.equal(level("add")(rgb, thermal, None, False), rgb + thermal)
    concat = level("concat")
    weight = concat.conv.weight[:, :, 0, 0]
    expected = torch.einsum("oc,bchw->bohw", weight[:, :8], rgb) + torch.einsum("oc,bchw->bohw", weight[:, 8:], thermal)
    torch.testing.assert_close(concat(rgb, thermal, None, False), expected)


@torch.no_grad()
def test_the_average_is_over_what_is_there():
    rgb, thermal = two(height=1, width=4)
    seen = torch.tensor([[1.0, 0.0, 0.25, 0.0], [1.0, 1.0, 0.75, 0.0]])[None, :, None].expand(2, 2, 1, 4)
    fused, average = level("average")(rgb, thermal, seen, True), (rgb + thermal) / 2
    torch.testing.assert_close(fused[..., 0], average[..., 0])
    torch.testing.assert_close(fused[..., 1], thermal[..., 1])
    torch.testing.assert_close(fused[..., 2], (rgb + 3 * thermal)[..., 2] / 4)
    torch.testing.assert_close(fused[..., 3], average[..., 3])  # hidden in both
    assert torch.equal(level("average")(rgb, thermal, None, False), average)


@torch.no_grad()
def test_the_average_without_a_modality_is_the_other_ones_maps():
    model = network(fusion="average").eval()
    rgb, thermal = model.branch("rgb", image()), model.branch("thermal", image())
    hidden = torch.zeros(2, 2, 16, 24, dtype=torch.bool)
    hidden[:, 0] = True
    for fused, norm, alone in zip(model.fuse(rgb, thermal, hidden), model.backbone.fusion_norms, thermal, strict=True):
        torch.testing.assert_close(fused, norm(alone))


def test_the_average_ignores_the_pixels_of_a_missing_modality_in_evaluation():
    found = evaluated({"model.fusion": "average"})
    for side in ("rgb", "thermal"):
        assert np.array_equal(found[f"test.{side}=missing_mean"], found[f"test.{side}=missing_zero"])


@torch.no_grad()
def test_the_gate_weighs_as_its_formula_and_tells_it():
    rgb, thermal = two()
    gated = level("gated")
    down, up = gated.squeeze[0], gated.squeeze[2]
    for i in range(2):
        both = torch.cat([rgb[i], thermal[i]])
        channels = torch.sigmoid(up.weight @ F.relu(down.weight @ both.mean((1, 2)) + down.bias) + up.bias)
        scores = [
            sum(gated.gate.weight[m, c, 0, 0] * channels[c] * both[c] for c in range(16)) + gated.gate.bias[m]
            for m in (0, 1)
        ]
        weight = 1 / (1 + torch.exp(scores[1] - scores[0]))
        expected = weight * rgb[i] + (1 - weight) * thermal[i]
        torch.testing.assert_close(gated(rgb, thermal, None, False)[i], expected)
        torch.testing.assert_close(gated.weights(rgb, thermal)[i, 0], weight)
    assert gated.readout(rgb, thermal)["rgb"] == gated.weights(rgb, thermal)[:, 0].mean()


@torch.no_grad()
def test_rectification_is_the_formula_of_cmx():
    """out_1 = x_1 + 0.5 w_2^C x_2 + 0.5 w_2^S x_2, and the other way round."""
    rgb, thermal = two()
    rectify = level("frm_ffm").rectify
    both = torch.cat([rgb, thermal], 1)
    channel = rectify.channel(torch.cat([both.mean((2, 3)), both.flatten(2).max(2).values], 1)).view(2, 2, 8, 1, 1)
    place = rectify.place(both)
    expected = (
        rgb + 0.5 * channel[:, 1] * thermal + 0.5 * place[:, 1:] * thermal,
        thermal + 0.5 * channel[:, 0] * rgb + 0.5 * place[:, :1] * rgb,
    )
    for one, other in zip(rectify(rgb, thermal), expected, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_cross_attention_is_the_formula_of_cmx():
    """A place's query times softmax(K^T V / sqrt(d)) of the other stream, head by head and place by place."""
    maps = two()
    cross = level("frm_ffm").cross
    tokens = [x.flatten(2).transpose(1, 2) for x in maps]
    found = cross(*tokens)
    for image_ in range(2):
        halves = [F.relu(cross.split[m](tokens[m][image_])) for m in (0, 1)]
        residual, own = [half[:, :8] for half in halves], [half[:, 8:] for half in halves]
        for m in (0, 1):
            asked = torch.zeros(15, 8)
            for head in range(2):
                part = slice(4 * head, 4 * head + 4)
                both = cross.key_value[1 - m](own[1 - m])
                key, value = both[:, :8][:, part], both[:, 8:][:, part]
                context = (sum(key[n][:, None] * value[n][None] for n in range(15)) / 2).softmax(0)
                asked[:, part] = own[m][:, part] @ context
            mixed = cross.end[m](torch.cat([residual[m], asked], 1))
            torch.testing.assert_close(found[m][image_], cross.norm[m](tokens[m][image_] + mixed), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_embedding_of_cmx_follows_its_two_streams():
    maps = two()
    made = level("frm_ffm")
    streams = made.cross(*(x.flatten(2).transpose(1, 2) for x in made.rectify(*maps)))
    both = torch.cat(streams, 2).transpose(1, 2).reshape(2, 16, 3, 5)
    first, depth, _, last = made.embed
    x = F.conv2d(F.conv2d(both, first.weight, first.bias), depth.weight, depth.bias, padding=1, groups=8)
    x = F.conv2d(F.relu(x), last.weight, last.bias)
    expected = F.conv2d(both, made.residual.weight) + made.norm(x)
    torch.testing.assert_close(made(*maps, None, False), expected)


@torch.no_grad()
def test_tokens_of_a_low_score_give_way_to_the_other_modality():
    rgb, thermal = two()
    made = level("token_exchange")
    for net in made.nets:
        net[-1].weight.mul_(20)  # scores near 0 and 1
    scores = made.scores(rgb, thermal)
    assert 0 < (scores < EXCHANGED).float().mean() < 1
    share = made.mix.softmax(0)
    expected = torch.zeros_like(rgb)
    for b, y, x in np.ndindex(2, 3, 5):
        tokens = [scores[b, m, y, x] * maps[b, :, y, x] for m, maps in enumerate((rgb, thermal))]
        for m in (0, 1):
            expected[b, :, y, x] += share[m] * tokens[1 - m if scores[b, m, y, x] < EXCHANGED else m]
    torch.testing.assert_close(made(rgb, thermal, None, False), expected)
    torch.testing.assert_close(made.penalty(rgb, thermal), 0.5 * scores.sum())
    told = made.readout(rgb, thermal)
    torch.testing.assert_close(told["rgb_exchanged"], (scores[:, 0] < EXCHANGED).float().mean())
    torch.testing.assert_close(told["thermal_exchanged"], (scores[:, 1] < EXCHANGED).float().mean())


def test_the_loss_of_token_exchange_is_the_sum_of_its_scores_and_can_be_left_out():
    terms = step(trainer({"model.fusion": "token_exchange"})).terms
    double = step(trainer({"model.fusion": "token_exchange", "model.sparsity": 2e-4})).terms
    without = step(trainer({"model.fusion": "token_exchange", "model.sparsity": 0.0})).terms
    assert double["sparsity"] == pytest.approx(2 * terms["sparsity"])
    assert terms.keys() - without.keys() == {"sparsity"}
    assert "sparsity" not in step(trainer({})).terms


def test_the_journal_is_told_what_the_gate_relies_on():
    details = step(trainer({"model.fusion": "gated"})).details
    told = {name: value for name, value in details.items() if name.startswith("reliance/")}
    assert list(told) == [f"reliance/rgb_{stride}" for stride in (4, 8, 16, 32)]
    assert all(0 < value < 1 for value in told.values())
    assert not any(name.startswith("reliance/") for name in step(trainer({})).details)


# ---------------------------------------------------------------------------------------------- norms


def maps_of(seed: int) -> Tensor:
    return torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def normalised(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


@pytest.fixture(params=[False, True], ids=["alone", "one of several processes"])
def process(request) -> bool:
    """Whether the norms talk to other processes (here: to themselves)."""
    if not request.param:
        yield False
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield True
    dist.destroy_process_group()


@pytest.mark.parametrize("how", FUSION_NORMS)
def test_the_masked_pass_treats_the_statistics_as_its_name_says(how, process):
    norm, plain = BatchNorm(4, sync=process, how=how), torch.nn.BatchNorm2d(4)
    clean, masked = maps_of(0), maps_of(1)
    torch.testing.assert_close(norm(clean), plain(clean))
    expected = F.batch_norm(masked, plain.running_mean, plain.running_var) if how == "frozen" else normalised(masked)
    torch.testing.assert_close(norm(masked, masked=True), expected, rtol=1e-4, atol=1e-5)
    if how == "shared":
        plain(masked)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)
    assert norm.num_batches_tracked == plain.num_batches_tracked
    norm.eval(), plain.eval()
    torch.testing.assert_close(norm(masked, masked=True), plain(masked))


@pytest.mark.parametrize("fusion", ["max", "frm_ffm"])
def test_only_shared_norms_follow_the_masked_pass_of_a_step(fusion):
    found = {}
    for how in FUSION_NORMS:
        made = trainer({"model.fusion": fusion, "model.fusion_norm": how, "optim.lr": 1e-12})
        done = step(made)
        norms = [module for module in made.model.modules() if isinstance(module, BatchNorm)]
        found[how] = done, torch.cat([norm.running_mean for norm in norms])
        assert {int(norm.num_batches_tracked) for norm in norms} == {2 if how == "shared" else 1}
    (shared, mean), (separate, own), (frozen, same) = found.values()
    assert separate.terms == shared.terms and torch.equal(own, same) and not torch.equal(own, mean)
    assert frozen.terms["fused"] == shared.terms["fused"] and frozen.terms["masked"] != shared.terms["masked"]


# ---------------------------------------------------------------------------------------------- controls


def scored(model: Segmenter, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return semantic_scores(model.eval()(pixels), (64, 96))


@pytest.mark.parametrize(("inputs", "own"), [("rgb", slice(0, 3)), ("thermal", slice(3, 4))])
def test_one_modality_alone_is_its_branch_and_the_head_of_the_whole_network(inputs, own):
    """The other modality may be anything, also missing; and there are no parameters for it."""
    model, whole = network(inputs=inputs), network().eval()
    weights = model.state_dict()
    assert not [
        path
        for path in weights
        if "fusion" in path or path.startswith(f"backbone.{'thermal' if inputs == 'rgb' else 'rgb'}.")
    ]
    whole.load_state_dict(whole.state_dict() | weights)
    with torch.no_grad():
        expected = semantic_scores(whole.head(whole.branch(inputs, image()), deep=False), (64, 96))
    torch.testing.assert_close(scored(model, image()), expected)
    other = torch.zeros_like(image())
    other[:, own] = image()[:, own]
    assert torch.equal(scored(model, other), scored(model, image()))


@torch.no_grad()
def test_an_early_network_is_one_swin_with_four_channels():
    model = network(inputs="early").eval()
    assert model.backbone.rgb.patch_embed.proj.weight.shape[1] == 4
    expected = Segmenter.head(model, model.backbone.rgb(image(), None), deep=False)
    rgb, thermal = model.branch("rgb", image()), model.branch("thermal", image())
    torch.testing.assert_close(model.head(model.fuse(rgb, thermal), deep=False).mask_logits, expected.mask_logits)


def test_an_early_network_without_a_modality_sees_the_mean_image_however_it_is_taken_away():
    found = evaluated(CONTROLS["early"])
    for side in ("rgb", "thermal"):
        for how in ("missing_route", "missing_token"):
            assert np.array_equal(found[f"test.{side}=missing_mean"], found[f"test.{side}={how}"])


def test_a_late_network_is_the_average_of_two_networks_of_one_modality():
    late = network(inputs="late")
    alone = {}
    for inputs in ("rgb", "thermal"):
        alone[inputs] = network(inputs=inputs)
        alone[inputs].load_state_dict({
            path: late.state_dict()[path.replace("decoder.", "decoder_thermal.", 1) if inputs == "thermal" else path]
            for path in alone[inputs].state_dict()
        })  # fmt: skip
    scores = {inputs: scored(model, image()) for inputs, model in alone.items()}
    torch.testing.assert_close(scored(late, image()), scores["rgb"] + scores["thermal"], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for inputs in ("rgb", "thermal"):  # routed around the other
            found = late.head(late.branch(inputs, image()), deep=False)
            torch.testing.assert_close(semantic_scores(found, (64, 96)), scores[inputs], rtol=1e-4, atol=1e-5)
        batch = [torch.cat(both) for both in zip(*(late.branch(name, image()) for name in alone), strict=True)]
        found = late.head(batch, deep=True)
        for i, (inputs, model) in enumerate(alone.items()):
            expected = model.head(model.branch(inputs, image()))
            torch.testing.assert_close(found.class_logits[:, 2 * i : 2 * i + 2], expected.class_logits)
        both = late.fuse(late.branch("rgb", image()), late.branch("thermal", image()))
        mixed = [torch.cat(three) for three in zip(both, late.branch("thermal", image()), both, strict=True)]
        found = semantic_scores(late.head(mixed, deep=False), (64, 96))
        expected = torch.cat([scored(late, image()), scores["thermal"], scored(late, image())])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sum(x.numel() for x in late.parameters()) == sum(
        x.numel() for model in alone.values() for x in model.parameters()
    )


def test_the_two_networks_of_a_late_one_are_trained_as_they_would_be_alone():
    """Equal losses at equal weights, and a gradient that is clipped by itself: one does not slow the other down."""
    changes = {f"model.{name}": value for name, value in SIZES.items()}
    late = trainer(CONTROLS["late"] | changes)
    terms = step(late).terms
    assert terms.keys() == {"rgb", "thermal"}
    decoders = (late.model.pixel_decoder, late.model.pixel_decoder_thermal)
    heads = [decoder.mask_features.weight.grad for decoder in decoders]
    assert all(grad.abs().sum() > 0 for grad in heads) and not torch.equal(*heads)
    made = trainer({**CONTROLS["late"], **changes, "loss.thermal": 2.0})
    assert step(made).terms["rgb"] == pytest.approx(terms["rgb"])
    parts = [{id(parameter) for parameter in part} for part in late.model.networks]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == {id(parameter) for parameter in late.model.parameters()}
    alone, heavy = (trainer({**CONTROLS["late"], "optim.clip": 0.01, "loss.thermal": weight}) for weight in (1.0, 50.0))
    for each in (alone, heavy):
        step(each)
    same = {
        path: torch.equal(ours, theirs)
        for (path, ours), (_, theirs) in zip(
            alone.model.named_parameters(), heavy.model.named_parameters(), strict=True
        )
    }
    assert all(is_same for path, is_same in same.items() if "thermal" not in path)
    assert not all(is_same for path, is_same in same.items() if "thermal" in path)


def test_the_gradient_of_one_network_is_clipped_as_pytorch_does_it():
    made = trainer({"optim.clip": 0.01})
    done = step(made)
    total = torch.stack([parameter.grad.norm() for parameter in made.model.parameters() if parameter.grad is not None])
    assert done.grad_norm > 0.01 and total.norm().item() == pytest.approx(0.01, rel=1e-4)


MASKED_EARLY = {
    "model.inputs": "early", "masking.fill": "mean", "loss.rgb": 0.0, "loss.thermal": 0.0, "loss.non_local": 0.0,
}  # fmt: skip


def test_four_channels_can_be_masked_by_the_mean_and_agree_with_themselves():
    terms = step(trainer(MASKED_EARLY)).terms
    assert list(terms) == ["fused", "masked", "complementary"]
    assert terms["masked"] != pytest.approx(terms["fused"], rel=1e-3) and terms["complementary"] > 0


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.inputs": "depth"}, r"no model\.inputs 'depth'"),
        ({"model.fusion": "mean"}, r"no model\.fusion 'mean'.*average"),
        ({"model.fusion_norm": "seperate"}, "Did you mean 'separate'"),
        ({"model.thermal_stem": "median"}, r"no model\.thermal_stem 'median'"),
        ({"model.inputs": "rgb"}, r"masking\.kind must be 'none'"),
        ({**CONTROLS["rgb"], "loss.thermal": 1.0}, r"loss\.thermal must be 0"),
        ({**CONTROLS["rgb"], "loss.rgb": 1.0}, r"loss\.rgb must be 0"),
        ({**CONTROLS["early"], "masking.kind": "complementary", "loss.masked": 1.0}, r"masking\.fill must be 'mean'"),
        ({**CONTROLS["thermal"], "masking.kind": "individual", "loss.masked": 1.0}, r"masking\.kind must be 'none'"),
        ({**MASKED_EARLY, "loss.non_local": 1.0}, r"loss\.non_local must be 0"),
        ({**MASKED_EARLY, "loss.rgb_masked": 1.0}, r"loss\.rgb_masked must be 0"),
        ({**CONTROLS["early"], "model.fusion": "gated"}, r"model\.fusion must stay 'max'"),
        ({**CONTROLS["thermal"], "model.share_from": 0}, r"model\.share_from must stay 4"),
        ({**CONTROLS["late"], "loss.fused": 1.0}, r"loss\.fused must be 0"),
        ({**CONTROLS["late"], "loss.rgb": 0.0}, r"loss\.rgb must be above 0"),
        ({**CONTROLS["late"], "loss.complementary": 1.0, "masking.view": "second"}, r"loss\.complementary must be 0"),
        ({"model.fusion_norm": "frozen", "loss.fused": 0.0, "loss.teacher": "eval"}, "clean fused pass in training"),
        ({"model.sparsity": 1e-3}, "'token_exchange'"),
        ({"model.thermal_stem": "sum"}, r"model\.init is 'none'"),
        ({**ALONE, "model.fusion_norm": "frozen"}, r"loss\.masked or loss\.complementary"),
        (
            {"model.fusion_norm": "separate", "loss.fused": 0.0, "loss.complementary": 0.0, "loss.non_local": 0.0},
            "clean fused pass in training",
        ),
    ],
)
def test_what_has_no_meaning_together_is_refused_by_name(changes, said):
    with pytest.raises(ValueError, match=said):
        override(CONFIG, changes)
