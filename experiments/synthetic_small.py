"""A small CRM network on the synthetic road scenes: minutes on a laptop, the demo's baseline.

    crm train synthetic_small

Two CPU threads train it in about a minute and a half. It is trained from scratch, so the learning rate is higher than
the published one and the same for backbones and head.
"""

from crm.config import Config, Data, Loss, Masking, Model, Optim

config = Config(
    data=Data(dataset="synthetic", size=(64, 96), crop=(64, 96), scale=(1.0, 1.0), jitter=0.5),
    model=Model(
        embed=16,
        depths=(1, 1, 1, 1),
        heads=(1, 2, 4, 8),
        window=4,
        drop_path=0.0,
        width=32,
        queries=12,
        encoder_layers=1,
        encoder_ffn=64,
        decoder_layers=2,
        decoder_ffn=64,
        decoder_heads=4,
    ),
    masking=Masking(patch=16),
    loss=Loss(points=192),
    optim=Optim(lr=3e-3, backbone_factor=1.0, clip=1.0, warmup=20),
    batch=8,
    steps=320,
    val_every=160,
)
