"""KP with Swin-B: the published setting.

    crm train kp_swin_b --data FOLDER
    crm train kp_swin_b --data FOLDER --recipe released

Needs swin_base_patch4_window7_224, brought by `crm weights import`. The released recipe starts from
swin_base_patch4_window7_224_22kto1k instead. Published result and settings: `crm show kp_swin_b`.
"""

from experiments import published

config = published("kp", "b")
