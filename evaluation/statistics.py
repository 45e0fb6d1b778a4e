"""Means, how sure they are, and whether two methods differ on the same pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Of one metric over pictures; those without a value (NaN) don't count.

    Args:
        error: standard error of the mean, NaN for a single picture.
    """

    mean: float
    error: float
    count: int


def summary(values: Sequence[float]) -> Summary:
    x = np.asarray([v for v in values if not math.isnan(v)], dtype=np.float64)
    if not len(x):
        return Summary(math.nan, math.nan, 0)
    if len(x) == 1 or not np.isfinite(x).all():  # equal pictures have an infinite PSNR
        return Summary(float(x.mean()), math.nan, len(x))
    return Summary(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))), len(x))


@dataclass(frozen=True)
class Difference:
    """Of two methods on the same pictures, a - b.

    Args:
        low, high: 95 % confidence interval of the mean difference (Student's t); NaN below two pictures.
        wins: share of the pictures on which a has the larger value; equal ones count half.
    """

    mean: float
    low: float
    high: float
    wins: float
    count: int

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Difference:
    """Paired: pictures on which either has no finite value are left out."""
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    d = d[np.isfinite(d)]
    wins = float(((d > 0) + 0.5 * (d == 0)).mean()) if len(d) else math.nan
    s = summary(d)
    half = quantile((1 + confidence) / 2, len(d) - 1) * s.error if len(d) > 1 else math.nan
    return Difference(s.mean, s.mean - half, s.mean + half, wins, len(d))


def quantile(p: float, freedom: int) -> float:
    """Of Student's t distribution, p in (0.5, 1).

    With t = sqrt(v) tan(a) its density is that of cos(a)^(v - 1), which is summed by the trapezoidal rule.
    """
    angle = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp((2 * p - 1) * area[-1], area, angle)))
