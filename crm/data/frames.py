"""One RGB-thermal frame as every data set hands it out.

h w = height, width in pixels
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Frame:
    name: str  # as in the data set's lists, e.g. "00012N"
    rgb: np.ndarray  # uint8 (h, w, 3)
    thermal: np.ndarray  # uint8 (h, w), brighter is warmer
    label: np.ndarray  # uint8 (h, w), class ids
    night: bool
    before: "Callable[[int], Frame] | None" = None  # pictures so many frames earlier; None: it is of no recording

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""
        return self.label.shape

    def same_as(self, other: "Frame") -> bool:
        """Whether name, time of day and every pixel agree."""
        return (self.name, self.night) == (other.name, other.night) and all(
            np.array_equal(getattr(self, part), getattr(other, part)) for part in ("rgb", "thermal", "label")
        )
