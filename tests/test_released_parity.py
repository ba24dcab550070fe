"""Our network and objective against tensors recorded from the released code.

Every folder with desc.json and weights.safetensors below $CRM_GOLDEN (default: shared/golden beside the repository) is
a case; its README says what the files hold.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from crm import config
from crm.model.segmenter import Segmenter, build_segmenter, semantic_scores
from crm.objective import Targets, make_targets, objective, set_losses
from crm.points import GivenPoints
from crm.weights import load_released, released_name

GOLDEN = Path(os.environ.get("CRM_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
CASES = sorted(path.parent for path in GOLDEN.glob("*/desc.json") if (path.parent / "weights.safetensors").exists())
PATHS = {"fused": "fused", "rgb": "rgb", "thermal": "thr"}
PASSES = {"fused": "rgbt", "rgb": "rgb", "thermal": "thr", "masked": "masked"}
MODES = ["random", "grid4"]


@dataclass(frozen=True)
class Case:
    folder: Path

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    @cached_property
    def desc(self) -> dict[str, Any]:
        return json.loads((self.folder / "desc.json").read_text())

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self.tensors("inputs")

    @cached_property
    def image(self) -> Tensor:
        return self.tensors("eval")["eval.padded_input"]

    @cached_property
    def hidden(self) -> Tensor:
        return self.inputs["masks"][:, :, 0].bool()

    @property
    def outputs(self) -> int:
        return self.desc["config"]["MODEL"]["MASK_FORMER"]["DEC_LAYERS"]

    def layer(self, output: int) -> str:
        return "final" if output == self.outputs - 1 else str(output)

    def model(self) -> Segmenter:
        """Built from the case's settings, with its weights, in training mode."""
        weights = self.tensors("weights")
        whole = self.desc["config"]["MODEL"]
        swin, former, head = whole["SWIN"], whole["MASK_FORMER"], whole["SEM_SEG_HEAD"]
        part = config.Model(
            embed=swin["EMBED_DIM"],
            depths=tuple(swin["DEPTHS"]),
            heads=tuple(swin["NUM_HEADS"]),
            window=swin["WINDOW_SIZE"],
            drop_path=swin["DROP_PATH_RATE"],
            fusion=whole["FUSION"]["AGGREGATION"].lower(),
            share_from=swin["SHARE_START_IDX"],
            width=former["HIDDEN_DIM"],
            queries=former["NUM_OBJECT_QUERIES"],
            encoder_layers=head["TRANSFORMER_ENC_LAYERS"],
            encoder_ffn=len(weights["sem_seg_head.pixel_decoder.transformer.encoder.layers.0.linear1.bias"]),
            decoder_layers=self.outputs - 1,
            decoder_ffn=former["DIM_FEEDFORWARD"],
            decoder_heads=former["NHEADS"],
        )
        model = build_segmenter(part, head["NUM_CLASSES"])
        load_released(model, weights)
        return model

    def targets(self) -> Targets:
        head = self.desc["config"]["MODEL"]["SEM_SEG_HEAD"]
        height, width = self.desc["padded_hw"]
        labels = [self.inputs[f"label.{i}"] for i in range(len(self.image))]
        stacked = torch.zeros(len(labels), height, width, dtype=torch.uint8)
        for into, label in zip(stacked, labels, strict=True):
            into[: label.shape[0], : label.shape[1]] = label
        valid = [(label.shape[0], label.shape[1]) for label in labels]
        return make_targets(stacked, head["NUM_CLASSES"], head["IGNORE_VALUE"], valid=valid)

    def loss(self) -> config.Loss:
        former = self.desc["config"]["MODEL"]["MASK_FORMER"]
        return config.Loss(points=former["TRAIN_NUM_POINTS"], count_padding=True, count_ignored=True)

    def points(self, mode: str) -> GivenPoints:
        """The recorded draws, or the centres of all cells of stride 4."""
        if mode == "grid4":
            height, width = (side // 4 for side in self.desc["padded_hw"])
            y, x = ((torch.arange(side) + 0.5) / side for side in (height, width))
            grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=2).flatten(0, 1)
            keys = [(name, output) for name in PASSES for output in range(self.outputs)]
            pairs = self.targets().num_masks
            return GivenPoints(
                dict.fromkeys(keys, grid.expand(len(self.image), -1, -1)),
                dict.fromkeys(keys, grid[:0].expand(pairs, -1, -1)),
                dict.fromkeys(keys, grid.expand(pairs, -1, -1)),
            )
        recorded = self.tensors("points")
        match, candidates, extra = {}, {}, {}
        for name, released in PASSES.items():
            for output in range(self.outputs):
                own = sorted(
                    key
                    for key in recorded
                    if key.startswith("rand.") and key.endswith(f".{released}.{self.layer(output)}")
                )
                *images, tried, rest = (recorded[key] for key in own)
                match[name, output], candidates[name, output], extra[name, output] = torch.cat(images), tried, rest
        return GivenPoints(match, candidates, extra)


@pytest.fixture(scope="module", params=CASES or [None], ids=lambda path: path.name if path else "none")
def case(request) -> Case:
    if request.param is None:
        pytest.skip(f"no recorded tensors in {GOLDEN}; set CRM_GOLDEN to their folder")
    return Case(request.param)


def close(ours: Tensor, recorded: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, recorded.to(ours.dtype), rtol=0, atol=tolerance)


def check_path(case: Case, model: Segmenter, maps: list[Tensor], recorded: dict[str, Tensor], prefix: str) -> None:
    for stage, level in enumerate(maps, start=2):
        close(level, recorded[f"{prefix}.res{stage}"])
    if f"{prefix}.mask_features" in recorded:
        features, levels = model.pixel_decoder(maps)
        close(features, recorded[f"{prefix}.mask_features"])
        for i, level in enumerate(levels):
            close(level, recorded[f"{prefix}.multi_scale_{i}"])
    prediction = model.head(maps)
    for output in range(case.outputs):
        name = prefix if output == case.outputs - 1 else f"{prefix}.aux{output}"
        for ours, kind in zip(prediction, ("pred_logits", "pred_masks"), strict=True):
            if f"{name}.{kind}" in recorded:  # not every one is stored for every path
                close(ours[output], recorded[f"{name}.{kind}"])


@torch.no_grad()
def test_every_output_in_evaluation_equals_the_released_one(case):
    model, recorded = case.model().eval(), case.tensors("eval")
    for state, hidden in {"clean": None, "masked": case.hidden}.items():
        features = model.features(case.image, hidden)
        for path, released in PATHS.items():
            check_path(case, model, getattr(features, path), recorded, f"eval.{state}.{released}")


@torch.no_grad()
def test_semantic_scores_equal_the_released_ones(case):
    model, recorded = case.model().eval(), case.tensors("eval")
    scores = semantic_scores(model(case.image), (case.image.shape[2], case.image.shape[3]))
    for i, image_scores in enumerate(scores):
        wanted = recorded[f"eval.sem_seg.{i}"]
        close(image_scores[:, : wanted.shape[1], : wanted.shape[2]], wanted)


@torch.no_grad()
def test_training_forward_equals_the_released_one_and_updates_batch_norm_alike(case):
    model, recorded = case.model(), case.tensors("train_forward")
    for state, hidden in {"clean": None, "masked": case.hidden}.items():
        features = model.features(case.image, hidden)
        check_path(case, model, features.fused, recorded, f"train.{state}.fused")
    own = model.state_dict()
    for name, buffer in case.tensors("bn_after_train_forward").items():
        close(own[released_name(name)], buffer)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_matching_and_every_loss_term_equal_the_released_ones(case, mode):
    model, recorded, costs = case.model(), case.desc["losses"][mode], case.tensors(f"cost_{mode}")
    clean, masked = model.features(case.image), model.features(case.image, case.hidden)
    targets = case.targets()
    for name, released in PASSES.items():
        maps = masked.fused if name == "masked" else getattr(clean, name)
        losses = set_losses(model.head(maps), [name], targets, case.loss(), case.points(mode))
        for output in range(case.outputs):
            layer = f"{released}.{case.layer(output)}"
            for i, present in enumerate(targets.classes):
                row = i * case.outputs + output
                wanted = costs[f"{layer}.{i}"]  # queries x targets, targets in the order of gt_classes
                order = [present.index(kind) for kind in case.inputs[f"gt_classes.{i}"].tolist()]
                close(losses.costs[row][:, order], wanted)
                queries, columns = recorded["indices"][layer][i]
                own = losses.pairs.row == row
                assert losses.pairs.query[own].tolist() == queries
                assert losses.pairs.category[own].tolist() == [present[order[column]] for column in columns]
            terms = recorded["raw_terms"]
            assert losses.classes[0, output].item() == pytest.approx(terms[f"{layer}.loss_ce"], abs=1e-4)
            assert losses.masks[0, output].item() == pytest.approx(terms[f"{layer}.loss_mask"], abs=1e-4)
            assert losses.dice[0, output].item() == pytest.approx(terms[f"{layer}.loss_dice"], abs=1e-4)


@pytest.mark.parametrize("head_passes", ["batched", "streamed"])
@pytest.mark.parametrize("mode", MODES)
def test_total_and_every_gradient_equal_the_released_ones(case, mode, head_passes):
    model, recorded = case.model(), case.desc["losses"][mode]
    points = case.points(mode)
    losses = objective(model, case.image, case.hidden, case.targets(), case.loss(), points, head_passes)
    terms = recorded["weighted_terms_as_returned"]
    assert losses.total.item() == pytest.approx(recorded["total"], rel=1e-5)
    assert losses.terms["complementary"].item() == pytest.approx(terms["self_comp"], abs=1e-4)
    assert losses.terms["non_local"].item() == pytest.approx(terms["self_nlocal"], abs=1e-4)
    for name, released in PASSES.items():
        wanted = sum(value for term, value in terms.items() if term.startswith(f"{released}."))
        assert losses.terms[name].item() == pytest.approx(wanted, rel=1e-5)

    losses.total.backward()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    error = norm = 0.0
    for name, wanted in case.tensors(f"grads_{mode}").items():
        own = parameters[released_name(name)].grad
        off, size = (own - wanted).norm().item(), wanted.norm().item()
        assert off <= 1e-2 * size + 1e-5, f"{name}: off by {off:.2e} of {size:.2e}"
        error, norm = error + off**2, norm + size**2
    assert error**0.5 <= 1e-3 * norm**0.5
    own = model.state_dict()
    for name, buffer in case.tensors("bn_after_train_forward").items():
        close(own[released_name(name)], buffer)
