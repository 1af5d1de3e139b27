"""Interleaved rounds, medians, and the spread that says whether to believe them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

SPREAD = 0.2
"""Largest interquartile range of a ratio, over its median, at which a measurement stands."""


class Summary(NamedTuple):
    """Median over rounds, and interquartile range over the median."""

    median: float
    spread: float


def summary(values: Sequence[float]) -> Summary:
    """Of one series.

    >>> summary([1.0, 1.0, 2.0, 1.0, 1.0])
    Summary(median=1.0, spread=0.0)
    """
    median = statistics.median(values)
    if len(values) < 2:
        return Summary(median, 0.0)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, (high - low) / median)


def ratio(upper: Sequence[float], lower: Sequence[float]) -> Summary:
    """Of the ratios round by round: what slows a whole round down leaves them alone."""
    return summary([a / b for a, b in zip(upper, lower, strict=True)])


def interleave(
    turns: Mapping[str, Callable[[int], float]],
    steps: Mapping[str, int],
    *,
    rounds: int,
    pair: tuple[str, str] | None = None,
    attempts: int = 3,
) -> tuple[dict[str, list[float]], int]:
    """Seconds per step by contender and round, A B C, B C A, ...; again while the spread of ``pair`` is too large.

    Args:
        turns: contenders, warm after one call.
        steps: of a turn, by contender.
        rounds: of one attempt.
        pair: the two whose ratio decides; None: one attempt.
        attempts: at most; the one with the smallest spread is kept.
    Returns:
        The series, and the number of attempts.
    """
    names, best, made = list(turns), {}, 0
    for name in names:
        turns[name](steps[name])
    for made in range(1, attempts + 1):  # noqa: B007 - the number is returned
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                seconds[name].append(turns[name](steps[name]))
        if not best or pair is None or _spread(seconds, pair) < _spread(best, pair):
            best = seconds
        if pair is None or not set(pair) <= set(names) or _spread(best, pair) <= SPREAD:
            break
    return best, made


def _spread(seconds: Mapping[str, Sequence[float]], pair: tuple[str, str]) -> float:
    return ratio(seconds[pair[0]], seconds[pair[1]]).spread if set(pair) <= set(seconds) else 0.0
