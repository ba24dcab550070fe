"""PST900 with Swin-B: the published setting.

    crm train pst900_swin_b --data FOLDER
    crm train pst900_swin_b --data FOLDER --recipe released

Needs swin_base_patch4_window7_224, brought by `crm weights import`. Published result and settings: `crm show
pst900_swin_b`.
"""

from experiments import published

config = published("pst900", "b")
