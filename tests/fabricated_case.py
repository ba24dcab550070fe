"""Cases in the format of the recordings, made here: the network is ours, the losses are written out plainly.

The plain losses are those of method.md section 2, one image, one mask and one decoder output at a time, on masks as
images: what `crm.objective` computes all at once from label maps. So other fusions, sharing, class counts, ignore ids,
padding and images without a class are compared with something on any machine.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from crm.config import Loss, Model
from crm.model.segmenter import Segmenter, build_segmenter
from crm.optim import build_optimizer
from crm.weights import export_name
from crm.weights.released import released_state
from tests.golden_case import MODES, PASSES, Case, outputs

# classes, ignored id, height and width of each image, fusion, first shared stage, queries; the rest is the same
FABRICATED: dict[str, dict[str, Any]] = {
    "add_shared_mixed_sizes": {"classes": 5, "sizes": [(100, 140), (96, 128)], "fusion": "ADD", "share": 2},
    "more_classes_than_queries": {"classes": 19, "ignore": 19, "sizes": [(60, 90), (64, 96), (33, 65)], "empty": [1]},
    "nothing_labelled": {"classes": 2, "sizes": [(64, 64), (40, 64)], "share": 0, "empty": [0, 1]},
}

OUTPUTS, HEADS, WIDTH, POINTS = 3, 4, 32, 48
SOLVER = {
    "BASE_LR": 1e-4,
    "BACKBONE_MULTIPLIER": 0.1,
    "WEIGHT_DECAY": 0.05,
    "WEIGHT_DECAY_NORM": 0.0,
    "WEIGHT_DECAY_EMBED": 0.0,
    "CLIP_GRADIENTS": {"CLIP_VALUE": 0.01},
}


def settings(classes: int, ignore: int, fusion: str, share: int, queries: int) -> dict[str, Any]:
    """The part of a released configuration that a case reads."""
    return {
        "PIXEL_MEAN": [123.675, 116.28, 103.53, 127],
        "PIXEL_STD": [58.395, 57.12, 57.375, 60],
        "SWIN": {
            "EMBED_DIM": 8,
            "DEPTHS": [1, 2, 1, 1],
            "NUM_HEADS": [1, 2, 2, 4],
            "WINDOW_SIZE": 7,
            "DROP_PATH_RATE": 0.0,
            "SHARE_START_IDX": share,
        },
        "FUSION": {"AGGREGATION": fusion},
        "MASK_FORMER": {
            "HIDDEN_DIM": WIDTH,
            "NUM_OBJECT_QUERIES": queries,
            "DEC_LAYERS": OUTPUTS,
            "DIM_FEEDFORWARD": 24,
            "NHEADS": HEADS,
            "CLASS_WEIGHT": 2.0,
            "MASK_WEIGHT": 5.0,
            "DICE_WEIGHT": 5.0,
            "NO_OBJECT_WEIGHT": 0.1,
            "TRAIN_NUM_POINTS": POINTS,
            "OVERSAMPLE_RATIO": 3.0,
            "IMPORTANCE_SAMPLE_RATIO": 0.75,
        },
        "SEM_SEG_HEAD": {"NUM_CLASSES": classes, "IGNORE_VALUE": ignore, "TRANSFORMER_ENC_LAYERS": 1},
        "CRMLOSS": {"MWS_WEIGHT": 1.0, "SDC_WEIGHT": 1.0, "SDN_WEIGHT": 1.0},
    }


def fabricate(
    folder: Path,
    *,
    classes: int,
    sizes: list[tuple[int, int]],
    ignore: int = 255,
    fusion: str = "MAX",
    share: int = 4,
    queries: int = 9,
    empty: list[int] | None = None,
) -> Case:
    """Writes a case; `empty` lists the images of which every pixel is ignored."""
    torch.manual_seed(0)
    padded = [-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True)]
    desc: dict[str, Any] = {
        "padded_hw": padded,
        "config": {"MODEL": settings(classes, ignore, fusion, share, queries), "SOLVER": SOLVER},
    }
    case = Case(folder)

    def save(name: str, tensors: dict[str, Tensor]) -> None:
        save_file(
            {key: value.detach().to(stored(value)).contiguous().clone() for key, value in tensors.items()},
            folder / f"{name}.safetensors",
        )

    def describe() -> None:
        (folder / "desc.json").write_text(json.dumps(desc))
        case.__dict__.pop("desc", None)  # read anew

    save("inputs", inputs(classes, ignore, sizes, padded, empty or []))
    save("weights", weights(desc["config"]["MODEL"], classes))
    describe()
    save("points", draws(case))
    exact = Case(folder, torch.float64)
    for phase, name in (("eval", "eval"), ("train", "train_forward")):
        model = case.model().train(phase == "train")
        save(name, {key: value for key, value in outputs(case, model, phase).items() if key.startswith(phase)})
        if phase == "train":
            norms = {key: buffer for key, buffer in model.state_dict().items() if "fusion_norms" in key}
            norms = {key: buffer for key, buffer in norms.items() if "running" in key or "batches" in key}
            save("bn_after_train_forward", {export_name(key): buffer for key, buffer in norms.items()})
        result = outputs(exact, exact.model().train(phase == "train"), phase)
        save(f"{name}_f64", {key: value for key, value in result.items() if key.startswith(phase)})
    desc["losses"] = {}
    for mode in MODES:
        recorded, gradient, costs = plain_objective(case, case.model(), mode)
        recorded["f64"], gradient_f64, _ = plain_objective(exact, exact.model(), mode)
        recorded["f64"]["official_fp32_grad_error_whole_and_worst_param"] = rounding(gradient, gradient_f64)
        desc["losses"][mode] = recorded
        save(f"grads_{mode}", gradient)
        save(f"grads_{mode}_f64", gradient_f64)
        save(f"cost_{mode}", costs)
    two_steps(case, desc, save)
    describe()
    return case


def rounding(gradient: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, float]:
    """What float32 does to the gradient: to the whole of it, and to the parameter it does most to; relative."""
    off = torch.stack([(gradient[name] - value).norm() for name, value in exact.items()])
    size = torch.stack([value.norm() for value in exact.values()])
    clear = size > 1e-6 * size.norm()  # the rest is 0 but for rounding
    return (off.norm() / size.norm()).item(), (off / size)[clear].max().item()


def stored(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def inputs(
    classes: int, ignore: int, sizes: list[tuple[int, int]], padded: list[int], empty: list[int]
) -> dict[str, Tensor]:
    """Random images, labels in blocks of 12 pixels with some ignored ones, and random masks."""
    found = {"masks": (torch.rand(len(sizes), 2, 1, padded[0] // 4, padded[1] // 4) < 0.4).to(torch.uint8)}
    for i, (height, width) in enumerate(sizes):
        coarse = torch.randint(0, classes, (height // 12 + 1, width // 12 + 1))
        coarse[torch.rand(coarse.shape) < 0.2] = ignore
        label = coarse.repeat_interleave(12, 0).repeat_interleave(12, 1)[:height, :width].to(torch.uint8)
        label = torch.full_like(label, ignore) if i in empty else label
        found[f"image.{i}"] = torch.randint(0, 256, (4, height, width)).float()
        found[f"label.{i}"] = label
        found[f"gt_classes.{i}"] = label[label != ignore].unique().long()
    return found


def weights(model: dict[str, Any], classes: int) -> dict[str, Tensor]:
    """A released state dict in which nothing is at its initial value."""
    swin, former = model["SWIN"], model["MASK_FORMER"]
    part = Model(
        embed=swin["EMBED_DIM"],
        depths=tuple(swin["DEPTHS"]),
        heads=tuple(swin["NUM_HEADS"]),
        drop_path=0.0,
        share_from=swin["SHARE_START_IDX"],
        width=WIDTH,
        queries=former["NUM_OBJECT_QUERIES"],
        encoder_layers=model["SEM_SEG_HEAD"]["TRANSFORMER_ENC_LAYERS"],
        encoder_ffn=24,
        decoder_layers=OUTPUTS - 1,
        decoder_ffn=former["DIM_FEEDFORWARD"],
        decoder_heads=HEADS,
    )
    network = build_segmenter(part, classes)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                noise = 0.1 * torch.randn(tensor.shape)
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)
    state = released_state(network, former["NO_OBJECT_WEIGHT"])
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}


def draws(case: Case) -> dict[str, Tensor]:
    """Uniform draws in the order of the released code."""
    found: dict[str, Tensor] = {}
    for name in PASSES:
        for output in (case.outputs - 1, *range(case.outputs - 1)):
            shapes = [(1, POINTS)] * len(case.images) + [(case.pairs, 3 * POINTS), (case.pairs, POINTS // 4)]
            for shape in shapes:
                found[f"rand.{len(found):03d}.{PASSES[name]}.{case.layer(output)}"] = torch.rand(*shape, 2)
    return found


def two_steps(case: Case, desc: dict[str, Any], save: Callable[[str, dict[str, Tensor]], None]) -> None:
    model, totals = case.model(), []
    optimizer = build_optimizer(model, case.optim)
    names = {id(parameter): export_name(name) for name, parameter in model.named_parameters()}
    desc["param_groups"] = [
        {"name": names[id(parameter)], "lr": group["lr"], "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    for _ in range(2):
        totals.append(plain_objective(case, model, "grid4")[0]["total"])
        nn.utils.clip_grad_norm_(model.parameters(), case.optim.clip)
        optimizer.step()
    desc["losses"]["optim_steps_grid4_total"] = totals
    state = {export_name(name): tensor for name, tensor in model.state_dict().items() if "position_index" not in name}
    save("weights_after_2_steps_grid4", state)


# ---------------------------------------------------------------------------------------------- plain losses


def plain_objective(
    case: Case, model: Segmenter, mode: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """What a description records of the losses, gradients under released names, and matching costs."""
    model.zero_grad()
    clean, masked = model.features(case.image), model.features(case.image, case.hidden)
    points, targets = case.points(mode), masks(case)
    raw, indices, costs, final = {}, {}, {}, {}
    for name, released in PASSES.items():
        prediction = model.head(masked.fused if name == "masked" else getattr(clean, name))
        final[name] = prediction.class_logits[-1]
        for output in range(case.outputs):
            layer, key = f"{released}.{case.layer(output)}", (name, output)
            logits, shapes = prediction.class_logits[output], prediction.mask_logits[output]
            found = [
                match(case.loss, case.inputs[f"gt_classes.{i}"], logits[i], shapes[i], targets[i], points.match[key][i])
                for i in range(len(case.images))
            ]
            costs |= {f"{layer}.{i}": cost for i, (cost, _) in enumerate(found)}
            indices[layer] = [pair for _, pair in found]
            drawn = (points.candidates[key], points.extra[key])
            for kind, value in set_terms(case, logits, shapes, targets, indices[layer], drawn).items():
                raw[f"{layer}.{kind}"] = value
    factors = {
        "loss_ce": case.loss.class_weight,
        "loss_mask": case.loss.mask_weight,
        "loss_dice": case.loss.dice_weight,
    }
    weighted = {}
    for name, value in raw.items():
        released, layer, kind = name.split(".")
        weighted[f"{released}.{kind}" + ("" if layer == "final" else f"_{layer}")] = factors[kind] * value
    teacher, students = final["fused"].detach(), (model.class_logits(masked.rgb), model.class_logits(masked.thermal))
    weighted["self_comp"] = (teacher - final["masked"]).abs().mean()
    weighted["self_nlocal"] = sum((teacher - student).abs().mean() for student in students)
    total = sum(weighted.values())
    total.backward()
    gradient = {export_name(name): parameter.grad for name, parameter in model.named_parameters()}
    gradient = {name: value for name, value in gradient.items() if value is not None}
    norms = {name: value.norm().item() for name, value in gradient.items()}
    recorded = {
        "total": total.item(),
        "weighted_terms_as_returned": {name: value.item() for name, value in weighted.items()},
        "raw_terms": {name: value.item() for name, value in raw.items()},
        "indices": indices,
        "grad_norms": norms,
        "total_grad_norm": sum(norm**2 for norm in norms.values()) ** 0.5,
    }
    return recorded, gradient, costs


def masks(case: Case) -> list[Tensor]:
    """One image per class that occurs, padded with zeros; as the released code, ignored and padded pixels are 0."""
    found = []
    for i in range(len(case.images)):
        label, present = case.inputs[f"label.{i}"], case.inputs[f"gt_classes.{i}"]
        planes = torch.zeros(len(present), *case.padded, dtype=case.dtype)
        planes[:, : label.shape[0], : label.shape[1]] = (label == present[:, None, None]).to(case.dtype)
        found.append(planes)
    return found


def sample(planes: Tensor, points: Tensor) -> Tensor:
    """Planes (n h w) at points (n p 2) from 0 to 1."""
    return F.grid_sample(planes[:, None], 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]


@torch.no_grad()
def match(
    loss: Loss, present: Tensor, logits: Tensor, shapes: Tensor, targets: Tensor, points: Tensor
) -> tuple[Tensor, list[list[int]]]:
    """Costs (queries, targets) of one image and the cheapest assignment."""
    values = sample(shapes, points.expand(len(shapes), -1, -1))
    wanted = sample(targets, points.expand(len(targets), -1, -1))
    cost = values.new_zeros(len(values), len(wanted))
    for column, want in enumerate(wanted):
        want = want.expand_as(values)
        entropy = F.binary_cross_entropy_with_logits(values, want, reduction="none").mean(1)
        probability = values.sigmoid()
        dice = 1 - (2 * (probability * want).sum(1) + 1) / (probability.sum(1) + want.sum(1) + 1)
        likely = logits.softmax(1)[:, present[column]]
        cost[:, column] = loss.mask_weight * entropy - loss.class_weight * likely + loss.dice_weight * dice
    rows, columns = linear_sum_assignment(cost.numpy())
    return cost, [rows.tolist(), columns.tolist()]


def set_terms(
    case: Case,
    logits: Tensor,
    shapes: Tensor,
    targets: list[Tensor],
    indices: list[list[list[int]]],
    drawn: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """Unweighted class, mask and dice loss of one decoder output."""
    none = logits.shape[2] - 1
    category = torch.full(logits.shape[:2], none)
    entropies, dices, pair = [shapes.sum() * 0], [shapes.sum() * 0], 0  # so that a gradient of 0 arrives, not none
    for i, (queries, columns) in enumerate(indices):
        category[i, queries] = case.inputs[f"gt_classes.{i}"][columns]
        for query, column in zip(queries, columns, strict=True):
            shape, plane = shapes[i, query][None], targets[i][column][None]
            tried, extra = (points[pair][None] for points in drawn)
            with torch.no_grad():
                kept = min(int(case.loss.importance * case.loss.points), tried.shape[1])
                certain = sample(shape, tried)[0].abs().argsort()[:kept]
                where = torch.cat([tried[:, certain], extra], dim=1)
                wanted = sample(plane, where)
            value = sample(shape, where)
            entropies.append(F.binary_cross_entropy_with_logits(value, wanted))
            probability = value.sigmoid()
            dices.append(1 - (2 * (probability * wanted).sum() + 1) / (probability.sum() + wanted.sum() + 1))
            pair += 1
    weight = torch.ones(none + 1)
    weight[-1] = case.loss.no_object
    count = max(1, sum(len(planes) for planes in targets))
    return {
        "loss_ce": F.cross_entropy(logits.transpose(1, 2), category, weight.to(logits.dtype)),
        "loss_mask": torch.stack(entropies).sum() / count,
        "loss_dice": torch.stack(dices).sum() / count,
    }
