"""From evidence to outcome: a table of what a run may have seen, and what has to be said of it."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from bbvi_conv.monitor.distance import CUT_OFF
from bbvi_conv.monitor.intervals import Estimate, unavailable
from bbvi_conv.monitor.judge import Check
from bbvi_conv.monitor.trend import Trend
from bbvi_conv.verdict import DOUBLINGS, OUTCOMES, Evidence, Outcome, Verdict, decide, is_done, show

TOL = 0.01
NONE = unavailable("the Hessian of the loss is not positive definite here")
CUT = unavailable(CUT_OFF)
FIRST = unavailable("needs two windows of steps: run more steps")
ZERO, TINY, FAR = Estimate(0.0, -0.001, 0.001), Estimate(0.002, 0.0, 0.005), Estimate(1.0, 0.8, 1.3)
WIDE = Estimate(0.002, 0.0, 0.02)
GAIN, LOSS, VAGUE = Estimate(0.5, 0.4, 0.6), Estimate(-0.5, -0.6, -0.4), Estimate(0.0, -0.1, 0.1)
GOOD, BAD = Estimate(0.3, 0.1, 0.5), Estimate(0.9, 0.7, 1.1)


def evidence(
    *pairs: tuple[Estimate, Estimate], trend: Trend = "undecided", failure: str = "", interrupted: bool = False
) -> Evidence:
    """Checks of (gap, improvement), windows doubling."""
    checks = tuple(
        Check(500 * 2**i, gap, NONE, improvement, Estimate(-1.0, -1.1, -0.9))
        for i, (gap, improvement) in enumerate(pairs)
    )
    return Evidence(checks, trend, f"the trend is {trend}", failure, interrupted)


TABLE: list[tuple[str, Evidence, Estimate, Outcome]] = [
    ("gap under the tolerance, nothing gained", evidence((FAR, FIRST), (TINY, ZERO)), GOOD, "converged"),
    ("a gain that is not significant", evidence((FAR, FIRST), (TINY, VAGUE)), GOOD, "converged"),
    (
        "even if the iterates have a noise floor",
        evidence((FAR, FIRST), (TINY, ZERO), trend="plateau"),
        GOOD,
        "converged",
    ),
    ("k-hat unknown", evidence((FAR, FIRST), (TINY, ZERO)), unavailable("no"), "converged"),
    ("three quiet windows without a gap", evidence((NONE, FIRST), *[(NONE, ZERO)] * 3), GOOD, "converged"),
    ("k-hat too large", evidence((FAR, FIRST), (TINY, ZERO)), BAD, "wrong_family"),
    ("k-hat too large, but not converged", evidence((FAR, FIRST), (FAR, GAIN)), BAD, "slow"),
    ("gap small, bound still gaining", evidence((FAR, FIRST), (TINY, GAIN)), GOOD, "slow"),
    ("far and gaining", evidence((FAR, FIRST), (FAR, GAIN), trend="decaying"), GOOD, "slow"),
    ("far and gaining at a constant gradient", evidence((FAR, FIRST), (FAR, GAIN), trend="plateau"), GOOD, "slow"),
    ("far, the gradient falling", evidence((FAR, FIRST), (FAR, VAGUE), trend="decaying"), GOOD, "slow"),
    ("far, falling, one bad window", evidence((FAR, FIRST), (FAR, LOSS), trend="decaying"), GOOD, "slow"),
    ("no gap, gaining", evidence((NONE, FIRST), (NONE, GAIN)), GOOD, "slow"),
    ("far, flat, nothing gained", evidence((FAR, FIRST), (FAR, VAGUE), trend="plateau"), GOOD, "stalled"),
    ("no gap, flat", evidence((NONE, FIRST), *[(NONE, ZERO)] * 3, trend="plateau"), GOOD, "stalled"),
    ("flat, gained by chance", evidence((FAR, FIRST), (FAR, VAGUE), (FAR, GAIN), trend="plateau"), GOOD, "stalled"),
    ("flat, gaining steadily", evidence((FAR, FIRST), (FAR, GAIN), (FAR, GAIN), trend="plateau"), GOOD, "slow"),
    ("up and down, last one up", evidence((FAR, FIRST), (FAR, LOSS), (FAR, GAIN)), GOOD, "stalled"),
    ("down, gradient growing", evidence((FAR, FIRST), (FAR, GAIN), (FAR, LOSS), trend="rising"), GOOD, "stalled"),
    ("wandering long ago", evidence((FAR, FIRST), (FAR, LOSS), *[(FAR, GAIN)] * 3), GOOD, "slow"),
    ("a loss that no gradient explains", evidence((FAR, FIRST), (TINY, LOSS)), GOOD, "undecided"),
    (
        "draws that leave a support",
        evidence((FAR, FIRST), (TINY, ZERO))._replace(outside="site 'z'"),
        GOOD,
        "wrong_family",
    ),
    ("one window only", evidence((TINY, FIRST)), GOOD, "undecided"),
    ("one window only, flat", evidence((FAR, FIRST), trend="plateau"), GOOD, "undecided"),
    ("interval around the tolerance", evidence((FAR, FIRST), (WIDE, ZERO)), GOOD, "undecided"),
    ("the same, flat", evidence((FAR, FIRST), (WIDE, ZERO), trend="plateau"), GOOD, "undecided"),
    ("no gap, two quiet windows", evidence((NONE, FIRST), *[(NONE, ZERO)] * 2), GOOD, "undecided"),
    ("no gap, windows too vague", evidence((NONE, FIRST), *[(NONE, VAGUE)] * 3), GOOD, "undecided"),
    ("cut off, nothing gained", evidence((FAR, FIRST), *[(CUT, ZERO)] * 3), GOOD, "stalled"),
    ("cut off from the start", evidence((CUT, FIRST)), GOOD, "stalled"),
    ("cut off once, and moving again", evidence((CUT, FIRST), (FAR, GAIN)), GOOD, "slow"),
    ("no check", evidence(), GOOD, "undecided"),
    ("not finite", evidence((TINY, FIRST), (TINY, ZERO), failure="step 7: site 'z'"), GOOD, "diverged"),
]


@pytest.mark.parametrize(("seen", "khat", "outcome"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_outcome(seen: Evidence, khat: Estimate, outcome: Outcome) -> None:
    verdict = decide(seen, TOL, khat, 0.7)
    assert verdict.outcome == outcome
    assert verdict.converged == (outcome == "converged")
    assert verdict.reasons
    assert all(reason.strip() == reason and reason for reason in verdict.reasons)
    assert OUTCOMES[outcome] in str(verdict)
    assert json.loads(json.dumps(verdict.to_json()))["outcome"] == outcome


def test_the_table_reaches_every_outcome_one_run_can_have() -> None:
    assert set(get_args(Outcome)) == set(OUTCOMES)
    assert {row[3] for row in TABLE} == set(OUTCOMES) - {"multimodal"}  # that one needs several seeds


@pytest.mark.parametrize("seen", [row[1] for row in TABLE], ids=[row[0] for row in TABLE])
def test_only_a_run_that_is_done_counts_as_converged(seen: Evidence) -> None:
    done = is_done(seen.checks, seen.trend, TOL)
    assert (decide(seen, TOL, GOOD, 0.7).outcome == "converged") == (done and not seen.failure and not seen.outside)


def test_reasons_carry_numbers_thresholds_and_advice() -> None:
    stalled = decide(TABLE[13][1], TOL, GOOD, 0.7)
    told = " ".join(stalled.reasons)
    assert "remaining gap 1 [0.8, 1.3] nats (tolerance 0.01)" in told
    assert "the trend is plateau" in told
    assert "lower the step size" in told
    family = decide(TABLE[5][1], TOL, BAD, 0.65)
    assert "k-hat 0.9 [0.7, 1.1] is above 0.65: use a richer family" in family.reasons[-1]
    assert "raise khat_draws" not in family.reasons[-1]
    assert "raise khat_draws to be sure" in decide(TABLE[5][1], TOL, BAD, 0.8).reasons[-1]
    assert decide(TABLE[5][1], TOL, BAD, 0.65, 0.89).outcome == "wrong_family"
    tails = decide(TABLE[5][1], TOL, BAD, 0.65, 0.985)
    assert tails.outcome == "converged"
    assert "is above 0.65, but 98% of its draws are effective: q differs" in tails.reasons[-1]
    missing = decide(evidence((NONE, FIRST)), TOL, GOOD, 0.7)
    assert NONE.reason in missing.reasons[0]
    assert FIRST.reason in missing.reasons[1]
    cut = decide(evidence((FAR, FIRST), (CUT, ZERO)), TOL, GOOD, 0.7)
    assert "every gradient is exactly zero" in cut.reasons[0]
    assert "start elsewhere, with smaller steps" in cut.reasons[-1]
    wandering = decide(evidence((FAR, FIRST), (FAR, LOSS), (FAR, GAIN)), TOL, GOOD, 0.7)
    assert any("the bound fell by 0.5 nats" in reason for reason in wandering.reasons)


def test_a_failure_names_its_place_and_what_is_left() -> None:
    told = decide(evidence(failure="step 7: the value of model site 'z' is not finite"), TOL, GOOD, 0.7).reasons
    assert "step 7" in told[0]
    assert "last finite parameters are kept" in told[1]


def test_an_interrupted_run_says_so() -> None:
    assert "stopped by the user" in " ".join(decide(evidence(interrupted=True), TOL, GOOD, 0.7).reasons)
    told = decide(evidence((FAR, FIRST), (FAR, GAIN), interrupted=True), TOL, GOOD, 0.7)
    assert told.reasons[-1] == "stopped by the user at step 1000"


def test_a_tighter_tolerance_never_turns_a_run_into_a_converged_one() -> None:
    for _, seen, _, _ in TABLE:
        done = [is_done(seen.checks, seen.trend, tol) for tol in (1e-6, 1e-3, 1e-2, 1e-1, 10.0)]
        if seen.checks and seen.checks[-1].gap.high is not None:
            assert done == sorted(done)


def test_the_last_three_windows_decide_where_there_is_no_gap() -> None:
    seen = evidence((NONE, FIRST), (NONE, GAIN), *[(NONE, ZERO)] * DOUBLINGS)
    assert is_done(seen.checks, "undecided", TOL)
    assert not is_done(seen.checks[:-1], "undecided", TOL)
    assert not is_done(seen.checks, "plateau", TOL)


def test_numbers_travel_with_the_outcome() -> None:
    verdict = Verdict("slow", ("more steps",), {"steps": 5, "bound": Estimate(1.0, 0.5, 1.5).to_json()})
    assert verdict.to_json() == {
        "outcome": "slow",
        "steps": 5,
        "bound": {"value": 1.0, "low": 0.5, "high": 1.5},
        "reasons": ["more steps"],
    }
    assert show(NONE) == f"not available: {NONE.reason}"


def test_phi_that_is_noise_is_told_with_what_helps_unless_the_run_converged() -> None:
    far, done = evidence((FAR, FIRST), (FAR, GAIN)), evidence((FAR, FIRST), (TINY, ZERO))
    faint, clear, none = Estimate(0.03, 0.0, 0.09), Estimate(0.09, 0.05, 0.13), unavailable("no phi")

    def told(seen: Evidence, signal: Estimate | None) -> str:
        return "; ".join(decide(seen._replace(signal=signal), TOL, GOOD, 0.7).reasons)

    said = told(far, faint)
    for word in ("gradient of phi is noise", "0.03 [0, 0.09]", "doubly-reparameterised", "larger batch", "more M"):
        assert word in said
    for seen, signal in ((far, clear), (far, none), (far, None), (done, faint)):
        assert "is noise" not in told(seen, signal)
