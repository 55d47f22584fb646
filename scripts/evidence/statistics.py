"""What two sets of answers to the same problems say of each other, and what several answers say."""

from collections.abc import Sequence
from math import comb
from statistics import fmean

from scipy.stats import binomtest


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """The p-value of "both are right equally often", by the problems on which they differ.

    The exact test of McNemar (Psychometrika 12, 1947): under it each such problem is a fair coin.
    """
    only_one = sum(a and not b for a, b in zip(one, other, strict=True))
    only_other = sum(b and not a for a, b in zip(one, other, strict=True))
    if not only_one + only_other:
        return 1.0
    return float(binomtest(only_one, only_one + only_other).pvalue)


def pass_at_k(right: Sequence[Sequence[bool]], k: int) -> float:
    """The mean chance that of k answers, drawn from those of a problem, one at least is right.

    Without bias: 1 - C(n - c, k) / C(n, k) for c right ones of n (arXiv 2107.03374, equation 1).
    """
    return fmean(1 - comb(len(each) - sum(each), k) / comb(len(each), k) for each in right)
