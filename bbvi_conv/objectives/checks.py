"""Argument checks that objectives share."""

from __future__ import annotations

from collections.abc import Sequence


def check_count(name: str, value: int) -> None:
    """Refuse a count below 1.

    Raises:
        ValueError: naming the argument.
    """
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_estimator(estimator: str, valid: Sequence[str]) -> None:
    """Refuse an estimator that is not valid for this objective.

    Raises:
        ValueError: naming the ones that are.
    """
    if estimator not in valid:
        raise ValueError(
            f"unknown or invalid estimator {estimator!r} for this objective; choose one of {', '.join(valid)}"
        )


def check_share(name: str, value: float, *, below_one: bool = False) -> None:
    """Refuse a number outside [0, 1], or [0, 1) with ``below_one``.

    Raises:
        ValueError: naming the argument.
    """
    if not (0 <= value < 1 if below_one else 0 <= value <= 1):
        raise ValueError(f"{name} must lie in [0, 1{')' if below_one else ']'}, got {value}")
