"""MF with Swin-T: the published setting.

    crm train mf_swin_t --data FOLDER
    crm train mf_swin_t --data FOLDER --recipe released

Needs swin_tiny_patch4_window7_224, brought by `crm weights import`. Published result and settings: `crm show
mf_swin_t`.
"""

from experiments import published

config = published("mf", "t")
