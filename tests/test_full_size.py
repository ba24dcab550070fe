"""Full-size networks: reference values that formulas alone give, and parameter counts.

tests/data/appendix_a.json holds what the released code computed with weights, images, labels and masks made by the
formulas below. Rows of evaluation run by default; rows of training are marked slow.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor

from crm.config import Loss, Model, Optim
from crm.losses import self_distillation
from crm.model.segmenter import Segmenter, build_segmenter, semantic_scores
from crm.objective import objective
from crm.optim import build_optimizer
from crm.points import ReleasedPoints
from crm.set_losses import set_losses
from crm.targets import make_targets
from crm.weights import export_name

RECORDED = json.loads((Path(__file__).parent / "data" / "appendix_a.json").read_text())
SIZE = (256, 320)  # padded; the images are 240 x 320
PASSES = {"fused": "rgbt", "rgb": "rgb", "thermal": "thr", "masked": "masked"}
SMALL = {"depths": (2, 2, 18, 2)}
SIZES = {"T": {}, "S": SMALL, "B": {**SMALL, "embed": 128, "heads": (4, 8, 16, 32)}}

# ------------------------------------------------------------------------------------- formulas


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of a weight, from its released name."""
    noise = np.asarray(np.random.RandomState(crc32(name.encode())).standard_normal(shape))
    if name.endswith("running_var"):
        value = 1 + 0.1 * np.abs(noise)
    elif name.endswith("running_mean"):
        value = 0.1 * noise
    elif "sampling_offsets.bias" in name:
        value = 1.5 * noise
    elif len(shape) == 1 and name.endswith("weight"):
        value = 1 + 0.1 * noise
    elif len(shape) == 1:
        value = 0.1 * noise
    elif "relative_position_bias_table" in name or name.endswith("mask_token"):
        value = 0.5 * noise
    elif "level_embed" in name or "query_" in name:
        value = noise
    else:
        value = noise / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32))


def filled() -> Segmenter:
    model = build_segmenter(Model(drop_path=0.0), num_classes=9)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(formula(export_name(name), tuple(tensor.shape)))
    return model


def image() -> Tensor:
    raw = np.random.RandomState(1234).randint(0, 256, (2, 4, 240, 320)).astype(np.float32)
    mean = torch.tensor([123.675, 116.28, 103.53, 127.0])[:, None, None]
    std = torch.tensor([58.395, 57.12, 57.375, 60.0])[:, None, None]
    return torch.nn.functional.pad((torch.from_numpy(raw) - mean) / std, (0, 0, 0, 16))


def labels() -> Tensor:
    coarse = torch.from_numpy(np.random.RandomState(7).randint(0, 9, (2, 6, 8)).astype(np.uint8))
    return coarse.repeat_interleave(40, 1).repeat_interleave(40, 2)


def hidden() -> Tensor:
    cells = torch.zeros(2, 80, dtype=torch.bool)
    for i, row in enumerate(cells):
        row[torch.from_numpy(np.random.RandomState(50 + i).permutation(80)[:40])] = True
    rgb = cells.view(2, 8, 10).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return torch.stack([rgb, ~rgb], dim=1)


# ------------------------------------------------------------------------------------- comparison


def check(name: str, tensor: Tensor, tolerance: float) -> None:
    """Shape, and six numbers, each to the tolerance and to the digits that are printed."""
    wanted = RECORDED["tensors"][name]
    flat = tensor.detach().double().flatten()
    assert list(tensor.shape) == wanted["shape"], name
    ours = {
        "mean": flat.mean(),
        "std": flat.std(),
        "absmax": flat.abs().max(),
        "first": flat[0],
        "mid": flat[len(flat) // 2],
        "last": flat[-1],
    }
    for key, value in ours.items():
        assert value.item() == pytest.approx(wanted[key], abs=tolerance + 5e-6), f"{name}: {key}"


def eval_rows(model: Segmenter) -> Iterator[tuple[str, Tensor]]:
    features, masked = model.features(image()), model.features(image(), hidden())
    for path, name in {"fused": "fused", "rgb": "rgb", "thermal": "thr"}.items():
        for i in range(4):
            yield f"eval.{name}.res{i + 2}", getattr(features, path)[i]
            yield f"eval.m{name}.res{i + 2}", getattr(masked, path)[i]
    mask_features, levels = model.pixel_decoder(features.fused)
    yield "eval.mask_features", mask_features
    for i, level in enumerate(levels):
        yield f"eval.multiscale{i}", level
    fused = model.head(features.fused)
    yield "eval.fused.pred_logits", fused.class_logits[-1]
    yield "eval.fused.pred_masks", fused.mask_logits[-1]
    yield "eval.fused.aux0.pred_logits", fused.class_logits[0]
    yield "eval.rgb.pred_logits", model.class_logits(features.rgb)
    yield "eval.thr.pred_logits", model.class_logits(features.thermal)
    yield "eval.sem_seg", semantic_scores(fused, SIZE)[:, :, :240]
    students = [model.class_logits(maps) for maps in (masked.fused, masked.rgb, masked.thermal)]
    distances = [self_distillation(fused.class_logits[-1], student) for student in students]
    yield "eval.sdc", distances[0]
    yield "eval.sdn", distances[1] + distances[2]


@pytest.fixture(scope="module")
def network() -> Segmenter:
    return filled()


@torch.no_grad()
def test_full_size_evaluation_equals_the_released_code(network):
    network.eval()
    check("input", image(), 1e-6)
    seen = {"input"}
    for name, tensor in eval_rows(network):
        if name in RECORDED["tensors"]:
            check(name, tensor, 1e-4)
        elif name in RECORDED["scalars"]:
            assert tensor.item() == pytest.approx(RECORDED["scalars"][name], rel=1e-3)
        if name == "eval.sem_seg":
            counts = tensor.argmax(1).flatten().bincount(minlength=9).tolist()
            assert counts == RECORDED["scalars"]["eval.argmax_hist"]
        seen.add(name)
    assert {name for name in RECORDED["tensors"] if not name.startswith("bn.")} <= seen


@pytest.mark.slow
def test_full_size_training_equals_the_released_code(network):
    """Losses with the released order of random draws, gradients and running statistics of one step."""
    recorded, loss = RECORDED["scalars"], Loss(count_padding=True, count_ignored=True)
    model = network.train()
    model.load_state_dict(filled().state_dict())
    targets = make_targets(labels(), 9, 255, padded=SIZE)
    points = ReleasedPoints(torch.Generator().manual_seed(0))
    losses = objective(model, image(), hidden(), targets, loss, points, "streamed")
    for name, released in PASSES.items():
        assert losses.terms[name].item() == pytest.approx(recorded[f"train.{released}.sum30"], rel=1e-3)
    assert losses.terms["complementary"].item() == pytest.approx(recorded["train.sdc"], rel=1e-3)
    assert losses.terms["non_local"].item() == pytest.approx(recorded["train.sdn"], rel=1e-3)
    assert losses.total.item() == pytest.approx(recorded["train.total"], rel=1e-4)
    losses.total.backward()
    norms = {export_name(name): parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(recorded["grad.norm"], rel=5e-3)
    for name, wanted in recorded.items():
        if name.startswith("gradnorm."):
            assert norms[name.removeprefix("gradnorm.")] == pytest.approx(wanted, rel=5e-3), name
    norm = model.backbone.fusion_norms[3]
    check("bn.res5.running_mean_after", norm.running_mean, 1e-5)
    check("bn.res5.running_var_after", norm.running_var, 1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_full_size_loss_terms_equal_the_released_code(network):
    recorded, loss = RECORDED["scalars"], Loss(count_padding=True, count_ignored=True)
    model = network.train()
    clean, masked = model.features(image()), model.features(image(), hidden())
    targets = make_targets(labels(), 9, 255, padded=SIZE)
    points = ReleasedPoints(torch.Generator().manual_seed(0))  # one stream, in the order of the passes
    for name, released in PASSES.items():
        prediction = model.head(masked.fused if name == "masked" else getattr(clean, name))
        losses = set_losses(prediction, [name], targets, loss, points)
        for output, end in {9: "", 0: "_0", 8: "_8"}.items():
            ours = {
                "loss_ce": loss.class_weight * losses.classes[0, output].item(),
                "loss_mask": loss.mask_weight * losses.masks[0, output].item(),
                "loss_dice": loss.dice_weight * losses.dice[0, output].item(),
            }
            for kind, value in ours.items():
                term = f"train.{released}.{kind}{end}"
                assert term not in recorded or value == pytest.approx(recorded[term], rel=1e-3), term


# ------------------------------------------------------------------------------------- counts


def on_paper(**changes) -> Segmenter:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return build_segmenter(Model(**changes), num_classes=9)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ("T", (74_924_094, 27_520_794, 27_517_722, 2_880, 5_421_504, 14_461_194)),
        ("S", (117_559_902, 48_838_698, 48_835_626, 2_880, 5_421_504, 14_461_194)),
        ("B", (193_495_610, 86_745_144, 86_741_048, 3_840, 5_544_384, 14_461_194)),
    ],
)
def test_parameters_are_as_many_as_in_the_released_code(size, wanted):
    model = on_paper(**SIZES[size])
    backbone = model.backbone
    parts = (model, backbone.rgb, backbone.thermal, backbone.fusion_norms, model.pixel_decoder, model.query_decoder)
    assert tuple(map(count, parts)) == wanted


@pytest.mark.parametrize(("share", "millions"), [(0, 47.41), (2, 48.90), (4, 74.92)])
def test_shared_stages_are_counted_once(share, millions):
    assert round(count(on_paper(share_from=share)) / 1e6, 2) == millions


def test_parameter_groups_are_as_large_as_in_the_released_code():
    optim = build_optimizer(on_paper(), Optim(), fused=False)
    sizes = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in optim.param_groups}
    assert {(round(rate, 9), decay): number for (rate, decay), number in sizes.items()} == {
        (1e-5, 0.05): 204,
        (1e-5, 0.0): 160,
        (1e-4, 0.05): 199,
        (1e-4, 0.0): 93,
    }
