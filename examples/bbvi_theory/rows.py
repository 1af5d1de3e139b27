"""The rows of the table: what is assumed, what is guaranteed, and the settings of a fit that shows it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import bbvi_conv as bc
from bbvi_conv.families import Exp, FullRank, Linear, MeanField, Mixture, RealNVP, SoftClip, Softplus
from bbvi_theory.targets import BANANA, FUNNEL, LINEAR, LOGISTIC, MODES, SCHOOLS, Target

STL = "sticking-the-landing"
ENERGY, ENTROPY, CONTROLLED = "energy", "pathwise (entropy in closed form)", f"energy + zero-mean {STL}"
SQRT = "C / sqrt(n)"
DOMKE = "Domke et al. 2023"
KIM_2023 = "Kim et al. 2023"
KIM_2024 = "Kim et al. 2024"
SURENDRAN = "Surendran et al. 2025"
DRAWS = 10

Quantity = Literal["objective gap of the average", "squared distance", "objective gap", "E||grad||^2"]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        reference: who proved it.
        target, family, parameterisation, estimator, optimiser: in words, but for the target.
        quantity: what is measured.
        guaranteed: the theorem's statement; None where there is none for this row.
        expected_slope: of log quantity in log n, at most; ``"geometric"`` for log quantity falling linearly in n.
        settings: of the fit.
    """

    reference: str
    target: Target
    family: str
    parameterisation: str
    estimator: str
    optimiser: str
    quantity: Quantity
    guaranteed: str | None
    expected_slope: float | Literal["geometric"] | None
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """A name for files."""
        words = (self.target.name, self.family, self.parameterisation, self.estimator, self.optimiser, self.quantity)
        return "-".join("".join(c if c.isalnum() else "_" for c in word) for word in words)

    @property
    def dense(self) -> bool:
        """Whether the family is full-rank."""
        return self.family == "full-rank"


GAUSSIANS: dict[str, Any] = {"mean-field": MeanField, "full-rank": FullRank}


def _convex(target: Target, family: str) -> list[Row]:
    """A log-concave target: linear parameterisations with their optimisers, then nonlinear ones."""
    regression = target.regression
    assert regression is not None
    smooth, strong = regression.smoothness, regression.convexity(family == "full-rank")
    floor = 0.5 / math.sqrt(smooth)
    linear = GAUSSIANS[family](0.5, Linear())
    contained = family == "full-rank" and target is LINEAR
    slow, fast = bc.InverseSqrt(1 / smooth), bc.InverseLinear(2 / strong, delay=2 * smooth / strong)
    constant = bc.Constant(0.1 / smooth)
    geometric: Any = "geometric" if contained else None
    floored = "geometric, q contains p" if contained else "none: q does not contain p, so to a floor set by the step"
    convex, strongly = "O(log n / sqrt n), convex", "O(1 / n), strongly convex"
    averaged: Quantity = "objective gap of the average"
    prox, proj = "prox-SGD", "proj-SGD"
    makes: list[tuple[str, str, str, Any, Quantity, str, Any]] = [
        (DOMKE, ENERGY, f"{prox}, {SQRT}", bc.ProximalSGD(slow), averaged, convex, -0.5),
        (DOMKE, ENTROPY, f"{proj}, {SQRT}", bc.ProjectedSGD(slow, floor), averaged, convex, -0.5),
        (DOMKE, STL, f"{proj}, {SQRT}", bc.ProjectedSGD(slow, floor), averaged, convex, -0.5),
        (DOMKE, ENERGY, f"{prox}, C / (n + c)", bc.ProximalSGD(fast), "squared distance", strongly, -1.0),
        (KIM_2024, STL, f"{proj}, C / (n + c)", bc.ProjectedSGD(fast, floor), "squared distance", strongly, -1.0),
        (KIM_2024, STL, f"{proj}, constant", bc.ProjectedSGD(constant, floor), "objective gap", floored, geometric),
        (DOMKE, CONTROLLED, f"{prox}, constant", bc.ProximalSGD(constant, True), "objective gap", floored, geometric),
    ]
    rows = []
    for reference, estimator, words, optimiser, quantity, says, slope in makes:
        objective = bc.ELBO(DRAWS, STL if STL in estimator else "pathwise")
        settings = {"family": linear, "objective": objective, "optimiser": optimiser}
        settings |= {"average": "all"} if quantity == averaged else {}
        rows.append(Row(reference, target, family, "linear", estimator, words, quantity, says, slope, settings))
    maps = {"exp": Exp(), "softplus": Softplus(), "soft-clip": SoftClip(1e-3, 10.0)}
    for name, scale_map in maps.items():
        settings = {
            "family": GAUSSIANS[family](0.5, scale_map),
            "objective": bc.ELBO(DRAWS),
            "optimiser": bc.SGD(bc.InverseSqrt(1 / smooth)),
        }
        words, norm = f"SGD, {SQRT}", "O(log n / sqrt n), smooth"
        rows.append(Row(KIM_2023, target, family, name, ENTROPY, words, "E||grad||^2", norm, -0.5, settings))
    return rows


def _stationary(target: Target) -> list[Row]:
    """A target that is not log-concave: only the gradient norm has a guarantee."""
    clipped, ball = SoftClip(1e-3, 10.0), 100.0
    adam, sgd = bc.TheoremAdam(target.step, radius=ball), bc.SGD(bc.InverseSqrt(target.step))
    small = bc.TheoremAdam(target.step / 10, radius=ball)  # for networks; at ten times it they blow up at once
    bounded = "O(log n / sqrt n), bounded and smooth"
    mixture = Mixture(2, FullRank(0.5, clipped), spread=2.0)
    in_ball, plain = f"Adam in a ball, {SQRT}", f"SGD, {SQRT}"
    makes: list[tuple[str, str, Any, str, str, str, Any, str | None]] = [
        (KIM_2023, "full-rank", FullRank(0.3), "softplus", ENTROPY, plain, sgd, None),
        (SURENDRAN, "full-rank", FullRank(0.3, clipped), "soft-clip", ENTROPY, plain, sgd, bounded),
        (SURENDRAN, "mean-field", MeanField(0.3, clipped), "soft-clip", STL, in_ball, adam, bounded),
        (SURENDRAN, "full-rank", FullRank(0.3, clipped), "soft-clip", ENTROPY, in_ball, adam, bounded),
        (SURENDRAN, "RealNVP", RealNVP(), "flow", ENTROPY, in_ball, small, None),
        (SURENDRAN, "mixture of 2", mixture, "soft-clip", "stratified", in_ball, adam, None),
    ]
    rows = []
    for reference, family, value, parameterisation, estimator, words, rule, says in makes:
        objective = bc.ELBO(DRAWS, STL if estimator == STL else "pathwise")
        settings = {"family": value, "objective": objective, "optimiser": rule}
        slope = -0.5 if says else None
        rows.append(
            Row(reference, target, family, parameterisation, estimator, words, "E||grad||^2", says, slope, settings)
        )
    if target is BANANA:  # the best parameters have norm 2: here the ball is in the way, and the mapping is looked at
        tight = bc.TheoremAdam(target.step, radius=1.0)
        settings = {"family": FullRank(0.3, clipped), "objective": bc.ELBO(DRAWS), "optimiser": tight}
        words = f"Adam in a tight ball, {SQRT}"
        rows.append(
            Row(SURENDRAN, target, "full-rank", "soft-clip", ENTROPY, words, "E||grad||^2", None, None, settings)
        )
    return rows


def table(*, quick: bool) -> list[Row]:
    """All rows; with ``quick`` one of every kind."""
    if quick:
        convex, rest = _convex(LINEAR, "full-rank"), _stationary(BANANA)
        return [convex[0], convex[5], convex[8], rest[2]]
    rows = [row for target in (LINEAR, LOGISTIC) for family in GAUSSIANS for row in _convex(target, family)]
    return rows + [row for target in (FUNNEL, BANANA, MODES, SCHOOLS) for row in _stationary(target)]
