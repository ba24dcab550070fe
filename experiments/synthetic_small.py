"""A small CRM network on the synthetic road scenes: minutes on a laptop, the demo's baseline.

    crm train synthetic_small

It is trained from scratch, so the learning rate is higher than the published one and the same for backbones and head;
one block per Swin stage and few points keep a step cheap on one thread.
"""

from crm.config import Config, Data, Loss, Masking, Model, Optim

config = Config(
    data=Data(dataset="synthetic", size=(64, 96), crop=(64, 96), scale=(1.0, 1.0), jitter=0.0),
    model=Model(
        init="none",
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
    loss=Loss(points=128),
    optim=Optim(lr=2e-3, backbone_factor=1.0, clip=1.0, warmup=20),
    batch=8,
    steps=300,
    val_every=150,
)
