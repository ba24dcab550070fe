"""One case: tensors recorded from the released code, and our network, inputs and losses set up alike.

Everything comes from the case's own settings. A tolerance is FACTOR times the rounding noise that the case records, or
what the README of the recordings calls reasonable where it records none. A case can be run in float64, too.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from crm import config
from crm.model.segmenter import Segmenter, build_segmenter, semantic_scores
from crm.points import GivenPoints
from crm.set_losses import SetLosses, set_losses
from crm.targets import Targets, make_targets
from crm.weights import load_released

FACTOR = 8  # how often the recorded rounding noise another implementation may be off
OUTPUT, TERM, WHOLE, SINGLE = 1e-4, 1e-4, 1e-3, 1e-2  # without recorded noise; gradients are relative to their norm
PATHS = {"fused": "fused", "rgb": "rgb", "thermal": "thr"}
PASSES = {"fused": "rgbt", "rgb": "rgb", "thermal": "thr", "masked": "masked"}
STATISTICS = ("MEAN", "STD")
KINDS = {"class": "loss_ce", "mask": "loss_mask", "dice": "loss_dice"}
MODES = ("random", "grid4")


@dataclass(frozen=True)
class Case:
    folder: Path
    dtype: torch.dtype = torch.float32

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.safetensors").is_file()

    @cached_property
    def desc(self) -> dict[str, Any]:
        return json.loads((self.folder / "desc.json").read_text())

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self.tensors("inputs")

    @property
    def settings(self) -> dict[str, Any]:
        return self.desc["config"]["MODEL"]

    @property
    def padded(self) -> tuple[int, int]:
        height, width = self.desc["padded_hw"]
        return height, width

    @cached_property
    def images(self) -> list[Tensor]:
        count = sum(name.startswith("image.") for name in self.inputs)
        return [self.inputs[f"image.{i}"] for i in range(count)]

    @property
    def image(self) -> Tensor:
        """Normalised in our precision with the float32 constants of the released code, and padded with zeros."""
        mean, std = (torch.tensor(self.settings[f"PIXEL_{name}"])[:, None, None].to(self.dtype) for name in STATISTICS)
        padded = torch.zeros(len(self.images), 4, *self.padded, dtype=self.dtype)
        for into, image in zip(padded, self.images, strict=True):
            into[:, : image.shape[1], : image.shape[2]] = (image.to(self.dtype) - mean) / std
        return padded

    @property
    def hidden(self) -> Tensor:
        return self.inputs["masks"][:, :, 0].bool()

    @property
    def outputs(self) -> int:
        """Of the query decoder: one per layer, and that of the learned queries."""
        return self.settings["MASK_FORMER"]["DEC_LAYERS"]

    def layer(self, output: int) -> str:
        return "final" if output == self.outputs - 1 else str(output)

    def term(self, name: str, kind: str, output: int) -> str:
        """The released name of a weighted loss term."""
        return f"{PASSES[name]}.{KINDS[kind]}" + ("" if output == self.outputs - 1 else f"_{output}")

    def model(self) -> Segmenter:
        """Built from the case's settings, with its weights, in training mode."""
        weights = self.tensors("weights")
        swin, former, head = (self.settings[part] for part in ("SWIN", "MASK_FORMER", "SEM_SEG_HEAD"))
        part = config.Model(
            embed=swin["EMBED_DIM"],
            depths=tuple(swin["DEPTHS"]),
            heads=tuple(swin["NUM_HEADS"]),
            window=swin["WINDOW_SIZE"],
            drop_path=swin["DROP_PATH_RATE"],
            fusion=self.settings["FUSION"]["AGGREGATION"].lower(),
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
        return model.to(self.dtype)

    @cached_property
    def targets(self) -> Targets:
        head = self.settings["SEM_SEG_HEAD"]
        labels = [self.inputs[f"label.{i}"] for i in range(len(self.images))]
        stacked = torch.zeros(len(labels), *self.padded, dtype=torch.uint8)
        for into, label in zip(stacked, labels, strict=True):
            into[: label.shape[0], : label.shape[1]] = label
        valid = [(label.shape[0], label.shape[1]) for label in labels]
        return make_targets(stacked, head["NUM_CLASSES"], head["IGNORE_VALUE"], valid=valid)

    @property
    def pairs(self) -> int:
        """Queries with a class, all images together: not every class finds a query if there are few."""
        queries = self.settings["MASK_FORMER"]["NUM_OBJECT_QUERIES"]
        return sum(min(queries, len(present)) for present in self.targets.classes)

    @property
    def loss(self) -> config.Loss:
        former, crm = self.settings["MASK_FORMER"], self.settings["CRMLOSS"]
        return config.Loss(
            rgb=crm["MWS_WEIGHT"],
            thermal=crm["MWS_WEIGHT"],
            complementary=crm["SDC_WEIGHT"],
            non_local=crm["SDN_WEIGHT"],
            class_weight=former["CLASS_WEIGHT"],
            mask_weight=former["MASK_WEIGHT"],
            dice_weight=former["DICE_WEIGHT"],
            no_object=former["NO_OBJECT_WEIGHT"],
            points=former["TRAIN_NUM_POINTS"],
            oversample=former["OVERSAMPLE_RATIO"],
            importance=former["IMPORTANCE_SAMPLE_RATIO"],
            count_padding=True,
            count_ignored=True,
        )

    @property
    def optim(self) -> config.Optim:
        solver = self.desc["config"]["SOLVER"]
        return config.Optim(
            lr=solver["BASE_LR"],
            backbone_factor=solver["BACKBONE_MULTIPLIER"],
            weight_decay=solver["WEIGHT_DECAY"],
            clip=solver["CLIP_GRADIENTS"]["CLIP_VALUE"],
        )

    def points(self, mode: str) -> GivenPoints:
        """The recorded draws, or the centres of all cells of stride 4."""
        keys = [(name, output) for name in PASSES for output in range(self.outputs)]
        if mode == "grid4":
            height, width = (side // 4 for side in self.padded)
            y, x = ((torch.arange(side, dtype=self.dtype) + 0.5) / side for side in (height, width))
            grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=2).flatten(0, 1)
            return GivenPoints(
                dict.fromkeys(keys, grid.expand(len(self.images), -1, -1)),
                dict.fromkeys(keys, grid[:0].expand(self.pairs, -1, -1)),
                dict.fromkeys(keys, grid.expand(self.pairs, -1, -1)),
            )
        recorded = {name: points.to(self.dtype) for name, points in self.tensors("points").items()}
        match, candidates, extra = {}, {}, {}
        for name, output in keys:
            end = f".{PASSES[name]}.{self.layer(output)}"
            draws = sorted(key for key in recorded if key.startswith("rand.") and key.endswith(end))
            images, rest = draws[: len(self.images)], draws[len(self.images) :]
            match[name, output] = torch.cat([recorded[key] for key in images])
            if not rest:  # no pairs, so nothing to draw
                rest, recorded["none"] = ["none", "none"], torch.zeros(0, 1, 2, dtype=self.dtype)
            candidates[name, output], extra[name, output] = (recorded[key] for key in rest)
        return GivenPoints(match, candidates, extra)

    # ------------------------------------------------------------------------------------------ tolerances

    def noise(self, phase: str, kind: str) -> float:
        """What an output of `phase` (eval, train) may be off in float32."""
        measured = [values.get(kind, 0.0) for values in self.desc.get("rounding_noise_max_abs", {}).values()]
        measured.append(self.desc.get("official_fp32_minus_f64_max_abs", {}).get(f"{phase}.{kind}", 0.0))
        return FACTOR * max(measured) or OUTPUT

    def term_noise(self, mode: str) -> float:
        """What a loss term may be off."""
        return FACTOR * self.desc["losses"][mode].get("f64", {}).get("max_abs_term_error", 0.0) or TERM

    def gradient_noise(self, mode: str) -> tuple[float, float]:
        """What the whole gradient, and that of one parameter, may be off, relative to its norm.

        Another number of threads may pass a kink of a ReLU or a sample on the other side; the whole gradient may be off
        as much as by that, once.
        """
        recorded = self.desc["losses"][mode]
        whole, single = recorded.get("f64", {}).get("official_fp32_grad_error_whole_and_worst_param", (0.0, 0.0))
        threads = recorded.get("one_thread_rel_grad", 0.0)
        return max(FACTOR * whole, threads) or WHOLE, FACTOR * max(single, threads) or SINGLE


def kind(name: str) -> str:
    """What a recorded output is: res, mask_features, multi_scale, pred_logits, pred_masks, sem_seg."""
    return re.sub(r"(?<=res)\d|_\d+$|\.\d+$", "", re.sub(r"\.\d+$", "", name).rpartition(".")[2])


@torch.no_grad()
def outputs(case: Case, model: Segmenter, phase: str) -> dict[str, Tensor]:
    """Everything our network computes, under the names of the recordings; a clean pass, then a masked one."""
    found = {"eval.padded_input": case.image}
    for state, hidden in {"clean": None, "masked": case.hidden}.items():
        features = model.features(case.image, hidden)
        for path, released in PATHS.items():
            maps, prefix = getattr(features, path), f"{phase}.{state}.{released}"
            found |= {f"{prefix}.res{i}": level for i, level in enumerate(maps, start=2)}
            mask_features, levels = model.pixel_decoder(maps)
            found[f"{prefix}.mask_features"] = mask_features
            found |= {f"{prefix}.multi_scale_{i}": level for i, level in enumerate(levels)}
            prediction = model.head(maps)
            for output in range(case.outputs):
                place = prefix if output == case.outputs - 1 else f"{prefix}.aux{output}"
                found[f"{place}.pred_logits"] = prediction.class_logits[output]
                found[f"{place}.pred_masks"] = prediction.mask_logits[output]
            if (phase, state, path) == ("eval", "clean", "fused"):
                scores = semantic_scores(prediction, case.padded)
                for i, image in enumerate(case.images):
                    found[f"eval.sem_seg.{i}"] = scores[i, :, : image.shape[1], : image.shape[2]]
    return found


@torch.no_grad()
def each_set_loss(case: Case, model: Segmenter, mode: str) -> dict[str, SetLosses]:
    """The supervised losses of every pass, from a clean and a masked forward pass in training mode."""
    clean, masked = model.features(case.image), model.features(case.image, case.hidden)
    return {
        name: set_losses(
            model.head(masked.fused if name == "masked" else getattr(clean, name)),
            [name],
            case.targets,
            case.loss,
            case.points(mode),
        )
        for name in PASSES
    }
