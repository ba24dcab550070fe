"""MF with Swin-S: the published setting.

    crm train mf_swin_s --data FOLDER
    crm train mf_swin_s --data FOLDER --recipe released

Needs swin_small_patch4_window7_224, brought by `crm weights import`. Published result and settings: `crm show
mf_swin_s`.
"""

from experiments import published

config = published("mf", "s")
