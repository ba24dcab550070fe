"""An untrained network as a run folder, made the way a user would: a file of weights, imported."""

from pathlib import Path

import torch

from crm.config import Model
from crm.model.segmenter import Segmenter, build_segmenter
from crm.weights.files import read_source
from crm.weights.imports import import_network
from crm.weights.released import released_file

SMALL = Model(
    init="none", embed=8, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8), window=4, width=32, queries=8, encoder_layers=1,
    encoder_ffn=24, decoder_layers=1, decoder_ffn=24, decoder_heads=4,
)  # fmt: skip


def network(classes: int, seed: int = 0) -> Segmenter:
    """A small network that predicts several classes in one image: its queries disagree about the class."""
    torch.manual_seed(seed)
    model = build_segmenter(SMALL, classes).eval()
    decoder = model.query_decoder
    with torch.no_grad():
        for part in (decoder.query_feat, decoder.query_embed, decoder.class_embed):
            part.weight.normal_()
        decoder.class_embed.bias.zero_()
        decoder.class_embed.bias[-1] = -5.0  # no query stays without a class
        for part in decoder.mask_embed[::2]:
            part.weight.normal_(std=0.5)
    return model


def imported(runs: Path, dataset: str, classes: int, changes: dict | None = None, seed: int = 0) -> Path:
    """Its run folder below `runs`."""
    runs.mkdir(parents=True, exist_ok=True)
    path = runs.parent / f"{dataset}-{seed}.ckpt"
    path.write_bytes(released_file(network(classes, seed), no_object=0.1, step=7))
    return import_network(read_source(path), runs, dataset=dataset, changes=changes or {}).path
