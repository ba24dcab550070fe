"""Calibration: whether a confidence of 0.8 is right in 80 of 100 pixels; histograms per image, and the ECE from them.

numpy only. n = images, h w = pixels, m = BINS bins of equal width over 0..1, [i/m, (i+1)/m), the last with its end

The scores of a Mask2Former head are sums of class times mask probabilities over the queries, "no object" left out: they
do not add up to 1. The confidence of a prediction is its score's share of the sum over all classes.
"""

import numpy as np

BINS = 15
CONFIDENCE = "score of the predicted class / sum of the scores of all classes"  # stands in every evaluation's record


def histogram(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of an image's counted pixels (any shape), per bin: how many, how many right, the sum of confidence; (m, 3)."""
    confidence = confidence.ravel().astype(np.float64)
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    both = np.bincount(2 * bins + right.ravel(), minlength=2 * BINS).reshape(BINS, 2)
    total = np.bincount(bins, weights=confidence, minlength=BINS)
    return np.stack([both.sum(axis=1), both[:, 1], total], axis=1)


def ece(histograms: np.ndarray) -> np.ndarray | float:
    """Expected calibration error in per cent from histograms (..., m, 3), summed over images; NaN without a pixel.

    The mean over the bins of |accuracy - mean confidence|, weighted by their pixels [Guo et al., On Calibration of
    Modern Neural Networks, ICML 2017, eq. 3].
    """
    pixels = histograms[..., 0].sum(axis=-1)
    gap = np.abs(histograms[..., 1] - histograms[..., 2]).sum(axis=-1)  # pixels * |accuracy - confidence|, per bin
    return 100 * np.divide(gap, pixels, out=np.full(np.shape(gap), np.nan), where=pixels > 0)[()]
