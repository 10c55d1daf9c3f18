"""Give products of unequal ranks one rank."""

from collections.abc import Mapping

from torch.nn.functional import pad

from tunerkit.plugin import Factors


def padded(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Pad every product with zeros to the largest rank among them, which is at least 1. The products stay the same."""
    rank = max((each.rank for each in factors.values()), default=1) or 1
    return {
        path: Factors(q=pad(each.q, (0, 0, 0, rank - each.rank)), p=pad(each.p, (0, rank - each.rank)))
        for path, each in factors.items()
    }
