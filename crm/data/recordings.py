"""Which recording a frame is from: neighbouring frames of one are nearly the same picture. Torch-free."""

import re

from crm.data.files import KP_NAME
from crm.data.specs import DATASETS

RUN = 20  # consecutive MF indices that count as one recording


def recording(name: str, dataset: str) -> str:
    """The recording of a frame, by its name alone; the name itself where every frame is a scene of its own.

    mf      its names do not tell where a drive ends: a run of RUN consecutive indices by day or at night, as in `D70`
    pst900  the bag, as in `31_bag1a`
    kp      the set, as in `set07`; its videos are cuts of one drive

    Args:
        dataset: a key of DATASETS; names of another one are recordings of their own.
    """
    spec = DATASETS.get(dataset)
    layout = spec.layout if spec else ""
    if layout == "mf" and (match := re.fullmatch(r"(\d+)([DN])(_flip)?", name)):
        return f"{match[2]}{int(match[1]) // RUN}"
    if layout == "kp" and (match := KP_NAME.fullmatch(name)):
        return match[1]
    if spec and spec.carve_out and (match := re.match(spec.carve_out.recording, name)):
        return match.group()
    return name
