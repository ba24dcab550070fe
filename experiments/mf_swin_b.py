"""MF with Swin-B: the published setting.

    crm train mf_swin_b --data FOLDER
    crm train mf_swin_b --data FOLDER --recipe released

Needs swin_base_patch4_window7_224, brought by `crm weights import`. Published result and settings: `crm show
mf_swin_b`.
"""

from experiments import published

config = published("mf", "b")
