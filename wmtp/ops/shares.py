"""The number of items that is a share of a total."""

import math


def share_of(total: int, share: float) -> int:
    """Return `share` times `total`, rounded up.

    A product that differs from an integer only by the rounding of floating-point numbers is that integer.

    >>> share_of(100, 0.07), math.ceil(0.07 * 100)
    (7, 8)
    """
    return math.ceil(share * total * (1 - 1e-12))
