"""Randomness as a function of what it is for, never of what happened before.

A step's numbers depend on (seed, step, purpose) alone. So a resumed run draws what the uninterrupted one drew, and
variants at equal seed see the same images and augmentations.
"""

from hashlib import sha256


def derive(*parts: int | str) -> int:
    """A 63-bit seed from integers and words; the same on every machine."""
    return int.from_bytes(sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
