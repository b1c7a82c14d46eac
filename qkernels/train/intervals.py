"""Intervals of the figures that a report states."""

from __future__ import annotations

import math


def share_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share of `count` independent pairs; by default with a confidence of 95 %.

    Wilson (1927), eq. 10: with n = count, the shares p' for which |share - p'| <= z sqrt(p' (1 - p') / n).
    """
    middle = share + z * z / (2 * count)
    width = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)
