"""What a run is: one module per experiment, each with a `config` in the clean recipe (`crm.recipes`).

The nine published settings, three data sets by three backbones, differ in what stands here and in nothing else (paper,
implementation details; released configs).
"""

from crm.config import Config, Data, Model

DATA = {
    "mf": Data(dataset="mf", size=(480, 640), crop=(240, 320)),
    "pst900": Data(dataset="pst900", size=(720, 1280), crop=(224, 320)),
    "kp": Data(dataset="kp", size=(512, 640), crop=(256, 320)),
}
SWIN = {
    "t": Model(init="swin_tiny_patch4_window7_224", embed=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)),
    "s": Model(init="swin_small_patch4_window7_224", embed=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24)),
    "b": Model(init="swin_base_patch4_window7_224", embed=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
}
BATCH = {"mf": 14, "pst900": 12, "kp": 12}
VAL_EVERY = {"mf": 280, "pst900": 245, "kp": 205}  # steps: five epochs of the released loader


def published(dataset: str, swin: str) -> Config:
    """The published setting of a data set and a backbone ("t", "s" or "b")."""
    return Config(data=DATA[dataset], model=SWIN[swin], batch=BATCH[dataset], val_every=VAL_EVERY[dataset])
