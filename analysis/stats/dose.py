"""Doses on an axis, and the line that is level at first and then falls.

v = rows along the dose, b = bootstrap draws
"""

import numpy as np

SPREAD = 10  # a spread of doses by more than this factor has a logarithmic axis


def dose_axis(x: np.ndarray, doses: np.ndarray) -> np.ndarray:
    """Where values lie on the axis that doses (v,) are drawn and fitted on.

    As they are; but doses above 0 that spread over more than a factor of ten, such as weights of 0 to 30 or patches of
    4 to 64, are spread by their logarithm, with 0 as far below the smallest as a factor of ten.
    """
    positive = doses[doses > 0]
    if not positive.size or positive.max() <= SPREAD * positive.min():
        return x
    unit = np.asarray(x, float) / positive.min()
    return np.where(unit <= 1, unit, 1 + np.log10(np.maximum(unit, 1)))


def dose_at(place: np.ndarray, doses: np.ndarray) -> np.ndarray:
    """The values at places on that axis: the inverse of `dose_axis`."""
    positive = doses[doses > 0]
    if not positive.size or positive.max() <= SPREAD * positive.min():
        return place
    return positive.min() * np.where(place <= 1, place, 10 ** (np.maximum(place, 1) - 1))


def broken_stick(x: np.ndarray, y: np.ndarray, places: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Where a line that is level at first begins to fall, and how steeply: (b,) and (b,) from x (v,) and y (v, b).

    Least squares of y = level - slope * max(0, x - bend) over bends from the first x to the last but one, since behind
    that any bend fits. A negative slope is a line that rises.
    """
    bends = np.linspace(x[0], x[-2], places)
    past = np.maximum(0, x[None, :] - bends[:, None])  # (p, v)
    centred = past - past.mean(axis=1, keepdims=True)
    moved = y - y.mean(axis=0)
    slope = -(centred @ moved) / (centred**2).sum(axis=1, keepdims=True)  # (p, b)
    error = (moved**2).sum(axis=0) - slope**2 * (centred**2).sum(axis=1, keepdims=True)
    best = error.argmin(axis=0)
    return bends[best], slope[best, np.arange(y.shape[1])]
