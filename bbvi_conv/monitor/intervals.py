"""A number with its interval, or the reason why there is none."""

from __future__ import annotations

from typing import NamedTuple


class Estimate(NamedTuple):
    """A statistic and its confidence interval.

    ``value`` is None when the statistic is not available; ``reason`` then says what would make it available. Where the
    statistic is an unbiased estimate of a non-negative quantity, ``value`` may be negative while ``low`` never is.

    Example:
        >>> Estimate(0.5, 0.25, 0.75).to_json()
        {'value': 0.5, 'low': 0.25, 'high': 0.75}
    """

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""

    @property
    def available(self) -> bool:
        """True when there is a number."""
        return self.value is not None

    def to_json(self) -> dict[str, float | str | None]:
        """``{value, low, high}``, and ``reason`` where there is one."""
        number: dict[str, float | str | None] = {"value": self.value, "low": self.low, "high": self.high}
        return number | {"reason": self.reason} if self.reason else number


def unavailable(reason: str) -> Estimate:
    """An :class:`Estimate` without a number.

    Raises:
        ValueError: if ``reason`` is empty, since "not available" always carries what would make it available.
    """
    if not reason.strip():
        raise ValueError("reason must say what would make the estimate available, got an empty string")
    return Estimate(None, None, None, reason)


def student_quantile(level: float, degrees: float) -> float:
    """Half width, in standard errors, of the two-sided Student interval of coverage ``level``.

    Raises:
        ValueError: if ``level`` is not inside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, for example 0.95, got {level}")
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + level / 2))
