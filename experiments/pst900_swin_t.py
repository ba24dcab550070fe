"""PST900 with Swin-T: the published setting.

    crm train pst900_swin_t --data FOLDER
    crm train pst900_swin_t --data FOLDER --recipe released

Needs swin_tiny_patch4_window7_224, brought by `crm weights import`. Published result and settings: `crm show
pst900_swin_t`.
"""

from experiments import published

config = published("pst900", "t")
