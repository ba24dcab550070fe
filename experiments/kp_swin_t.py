"""KP with Swin-T: the published setting.

    crm train kp_swin_t --data FOLDER
    crm train kp_swin_t --data FOLDER --recipe released

Needs swin_tiny_patch4_window7_224, brought by `crm weights import`. Published result and settings: `crm show
kp_swin_t`.
"""

from experiments import published

config = published("kp", "t")
