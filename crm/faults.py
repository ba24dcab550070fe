"""Faults on purpose, for tests alone: `CRM_FAULT="WHAT WHERE N"` lets something go wrong the N-th time it is done.

kill last.safetensors 2    SIGKILL in the middle of the second write of a file of that name
full last.safetensors 1    the disk is full from the first write of that file on
memory step 3              the device runs out of memory at the third training step of a process
"""

import errno
import os
import signal
from collections import Counter
from typing import BinaryIO

_times: Counter[tuple[str, str]] = Counter()


def strikes(what: str, where: str) -> bool:
    """Whether the fault is due now; counts the times it was asked."""
    wanted = os.environ.get("CRM_FAULT", "").split()
    if wanted[:2] != [what, where]:
        return False
    _times[what, where] += 1
    return _times[what, where] == int(wanted[2]) or (what == "full" and _times[what, where] > int(wanted[2]))


def while_writing(file: BinaryIO, content: bytes, name: str) -> None:
    """Called in the place of writing `content` under the final `name`: writes it, or half of it and then the fault."""
    if strikes("kill", name):
        file.write(content[: len(content) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if strikes("full", name):
        file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    file.write(content)
