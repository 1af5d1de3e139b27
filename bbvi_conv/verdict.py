"""The verdict on a run: one outcome of a closed list, the numbers it rests on, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from bbvi_conv.monitor.distance import CUT_OFF
from bbvi_conv.monitor.intervals import Estimate
from bbvi_conv.monitor.judge import Check
from bbvi_conv.monitor.seeds import FAR, Agreement
from bbvi_conv.monitor.trend import Plateau, Trend

Outcome = Literal["converged", "slow", "stalled", "diverged", "wrong_family", "multimodal", "undecided"]

OUTCOMES: dict[Outcome, str] = {
    "converged": "converged: the gap is below the tolerance and nothing more is to be gained",
    "slow": "still improving: the optimiser was on its way when the steps ran out",
    "stalled": "stalled: more steps of this size will not bring it closer",
    "diverged": "diverged: a loss or gradient was not finite",
    "wrong_family": "converged within the family, but the family does not fit the posterior",
    "multimodal": "independent seeds disagree: there is more than one optimum",
    "undecided": "undecided: the evidence does not settle it",
}
"""The closed list, each in words."""

DOUBLINGS = 3
"""Windows without improvement that decide where the remaining gap is not available."""

EFFECTIVE = 0.9
"""Share of draws that are effective from which a large k-hat is about far tails alone. Log weights of variance v leave
a share of about exp(-v), and KL(q || p) is then about v / 2: 0.05 nats."""

NOISE = 0.1
"""Signal-to-noise ratio of one gradient below which phi is told to be noise."""


class Evidence(NamedTuple):
    """What the decision rests on.

    Attributes:
        checks: every check of the run, oldest first.
        trend: of the plateau test on the squared gradient norm, with its sentence.
        failure: where and why a value was not finite, else empty.
        interrupted: whether the run was stopped by the user.
        signal: signal-to-noise ratio of phi's gradient over the last looks.
        parts: where held-out rows judge, the plateau test of every group of parameters.
        best_step: where held-out rows judge, the step at which the window that they like best ended.
        outside: which site has no density where the guide draws, else empty.
    """

    checks: Sequence[Check]
    trend: Trend
    trend_reason: str
    failure: str = ""
    interrupted: bool = False
    signal: Estimate | None = None
    parts: Mapping[str, Plateau] = {}
    best_step: int = 0
    outside: str = ""


@dataclass(frozen=True)
class Verdict:
    """Outcome, numbers and reasons; ``str()`` is what the terminal shows.

    Attributes:
        outcome: one of :data:`OUTCOMES`.
        reasons: sentences that carry the numbers, the thresholds and what to do.
        numbers: what ``verdict.json`` holds besides; every number is ``{value, low, high}`` or null with a reason.
    """

    outcome: Outcome
    reasons: tuple[str, ...]
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def converged(self) -> bool:
        """True for the outcome ``converged`` alone."""
        return self.outcome == "converged"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return {"outcome": self.outcome, **self.numbers, "reasons": list(self.reasons)}

    def __str__(self) -> str:
        return "\n".join([OUTCOMES[self.outcome], *(f"  - {reason}" for reason in self.reasons)])


def show(estimate: Estimate, unit: str = "nats") -> str:
    """``0.0031 [0.0012, 0.0050] nats``, or why there is no number.

    Example:
        >>> show(Estimate(0.5, 0.25, 0.75))
        '0.5 [0.25, 0.75] nats'
    """
    if estimate.value is None:
        return f"not available: {estimate.reason}"
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}] {unit}".rstrip()


def is_better(improvement: Estimate | None, tolerance: float) -> bool:
    """Whether a paired improvement is above the tolerance for sure."""
    return improvement is not None and improvement.low is not None and improvement.low > tolerance


def is_worse(improvement: Estimate | None, tolerance: float) -> bool:
    """Whether a paired improvement is a loss of more than the tolerance for sure."""
    return improvement is not None and improvement.high is not None and improvement.high < -tolerance


def is_cut_off(check: Check) -> bool:
    """Whether no parameter has a gradient any more, so that no step can change anything."""
    return check.gap.reason == CUT_OFF


def overfits(check: Check, tolerance: float) -> bool:
    """Whether since the best window the bound rose on the rows that train, and fell on held-out rows, for sure."""
    return is_worse(check.over_best, tolerance) and is_better(check.training, tolerance)


def is_over(checks: Sequence[Check], trends: Mapping[str, Trend], tolerance: float) -> bool:
    """The stopping rule where held-out rows judge: :func:`is_done`, or nothing more is to be gained on them.

    That is so where the model overfits. Without a remaining gap it is so, too, where held-out rows show no significant
    gain in the last window and theta and phi, each by itself, have come to a plateau; or in none of the last three.

    Args:
        checks: every check of the run, oldest first.
        trends: of the plateau test, by group of parameters.
        tolerance: nats.
    """
    if not checks:
        return False
    last = checks[-1]
    if overfits(last, tolerance):
        return True
    if is_done(checks, _worst(trends), tolerance) and not is_worse(last.over_best, tolerance):
        return True
    flat = bool(trends) and all(trend == "plateau" for trend in trends.values())
    return last.gap.high is None and _gains_nothing(checks, 1 if flat else DOUBLINGS, tolerance)


def _gains_nothing(checks: Sequence[Check], windows: int, tolerance: float) -> bool:
    """Whether none of the last windows improved significantly."""
    recent = [check.improvement for check in checks[-windows:]]
    return len(recent) == windows and all(e.low is not None and e.low <= tolerance for e in recent)


def _worst(trends: Mapping[str, Trend]) -> Trend:
    """One trend for several groups of parameters: a plateau of one is that of all."""
    found = set(trends.values())
    return next((trend for trend in _TRENDS if trend in found), "undecided")


_TRENDS: tuple[Trend, ...] = ("plateau", "rising", "undecided", "decaying")


def is_done(checks: Sequence[Check], trend: Trend, tolerance: float) -> bool:
    """The stopping rule.

    With a remaining gap: its whole interval lies under the tolerance and the paired improvement is not significantly
    above it, nor a loss of more, which says that the gradient is not that of the bound. Without one: no window of the
    last three doublings improved by the tolerance, intervals included, and the squared gradient norm has not stalled
    above zero. Where all parameters are cut off nothing is done.
    """
    if not checks:
        return False
    last = checks[-1]
    if last.gap.high is not None:
        changed = is_better(last.improvement, tolerance) or is_worse(last.improvement, tolerance)
        return last.gap.high < tolerance and last.improvement.value is not None and not changed
    if is_cut_off(last):
        return False
    recent = checks[-DOUBLINGS:]
    quiet = [c.improvement.high is not None and c.improvement.high < tolerance for c in recent]
    return len(recent) == DOUBLINGS and all(quiet) and trend != "plateau"


def decide(
    evidence: Evidence,
    tolerance: float,
    khat: Estimate,
    khat_threshold: float | None,
    effective: float | None = None,
) -> Verdict:
    """Outcome and reasons, in the order a reader needs them; ``effective`` is the share of k-hat's draws that count."""
    if evidence.failure:
        first = evidence.failure.startswith("step 0:")
        return Verdict(
            "diverged",
            (
                evidence.failure,
                "no step was made: check that site's data, of which the density may be zero, and where the guide starts"
                if first
                else "the last finite parameters are kept; lower the step size, give it a max_norm or rescale",
            ),
        )
    if not evidence.checks:
        return Verdict("undecided", (f"no check was made: {_why_none(evidence)}",))
    last = evidence.checks[-1]
    where = " on held-out rows" if last.on_held_out else ""
    reasons = [
        f"remaining gap {show(last.gap)} (tolerance {tolerance:g})",
        f"improvement over the last window{where} {show(last.improvement)}",
    ]
    if last.on_held_out:
        reasons += _of_held_out(evidence, tolerance)
        evidence = _apart(evidence)
        if overfits(last, tolerance):
            return Verdict("stalled", (*reasons, *_stopped(evidence)))
    if is_cut_off(last):
        advice = "start elsewhere, with smaller steps, or bound by what keeps a gradient, as softplus or a sigmoid does"
        return Verdict("stalled", (*reasons, advice, *_stopped(evidence)))
    if is_done(evidence.checks, evidence.trend, tolerance) and not is_worse(last.over_best, tolerance):
        if evidence.outside:
            return Verdict("wrong_family", (*reasons, evidence.outside))
        outcome, said = _family(khat, khat_threshold, effective)
        return Verdict(outcome, (*reasons, said))
    reasons += [evidence.outside] * bool(evidence.outside)
    reasons.append(f"gradient norm: {evidence.trend_reason}")
    if (fall := _worst_fall(evidence, tolerance)) is not None:
        reasons.append(
            f"the bound{where} fell by {-fall:.3g} nats over one of the last {DOUBLINGS} windows: it wanders"
        )
    outcome = _not_done(evidence, tolerance)
    if last.on_held_out and outcome != "stalled" and _gains_nothing(evidence.checks, DOUBLINGS, tolerance):
        outcome = "undecided"
        highest = max(e.high for e in (c.improvement for c in evidence.checks[-DOUBLINGS:]) if e.high is not None)
        reasons.append(
            f"held-out rows show no significant gain in any of the last {DOUBLINGS} windows, but cannot exclude one of "
            f"{highest:.3g} nats: give more of them, or a tol above that, to decide"
        )
    else:
        reasons.append(_ADVICE[outcome])
    if evidence.signal is not None and evidence.signal.high is not None and evidence.signal.high < NOISE:
        reasons.append(
            f"the gradient of phi is noise: signal to noise {show(evidence.signal, '')}, all below {NOISE:g}; the "
            "estimator sticking-the-landing, for K > 1 doubly-reparameterised, helps, and so do fewer K with more M, "
            "or a larger batch"
        )
    reasons += _stopped(evidence)
    return Verdict(outcome, tuple(reasons))


def _family(khat: Estimate, threshold: float | None, effective: float | None) -> tuple[Outcome, str]:
    """What the importance weights say of a run that is done."""
    said = f"k-hat {show(khat, '')}"
    if khat.value is None or threshold is None:
        return "converged", said
    if khat.value <= threshold:
        close = khat.high is not None and khat.high > threshold
        hint = ": its interval holds the threshold, raise khat_draws or use a richer family to be sure" if close else ""
        return "converged", f"{said} (threshold {threshold:.2f}){hint}"
    above = f"{said} is above {threshold:.2f}"
    if effective is not None and effective >= EFFECTIVE:
        share = f"{effective:.0%} of its draws are effective"
        return "converged", f"{above}, but {share}: q differs from the posterior in far tails alone"
    sure = khat.low is None or khat.low > threshold
    hint = "" if sure else "; its interval holds the threshold, so raise khat_draws to be sure"
    return "wrong_family", f"{above}: use a richer family or reparameterise the model{hint}"


def _stopped(evidence: Evidence) -> list[str]:
    return [f"stopped by the user at step {evidence.checks[-1].step}"] if evidence.interrupted else []


def _of_held_out(evidence: Evidence, tolerance: float) -> list[str]:
    """What held-out rows say of the newest parameters beside those of the best window, where those are better."""
    last, best = evidence.checks[-1], f"the window that ended at step {evidence.best_step}"
    over, training = last.over_best, last.training
    if over is None or training is None or not is_worse(over, tolerance):
        return []
    if overfits(last, tolerance):
        found = (
            f"the model overfits, held-out data show: since {best} the bound on held-out rows fell, improvement "
            f"{show(over)}, while that on the training rows rose, improvement {show(training)}; use more training "
            "data, fewer parameters or more regularisation"
        )
    else:
        found = f"held-out data: the bound on them is lower than for {best}, improvement {show(over)}"
    return [found, f"returned are the parameters of {best}, on held-out rows the best by paired comparison"]


def _apart(evidence: Evidence) -> Evidence:
    """The evidence with the plateau test of theta and phi apart in the place of that of both."""
    if not evidence.parts:
        return evidence
    trend = _worst({name: part.trend for name, part in evidence.parts.items()})
    sentence = "; ".join(f"{name}: {part.reason}" for name, part in evidence.parts.items())
    return evidence._replace(trend=trend, trend_reason=sentence)


_WORST: tuple[Outcome, ...] = ("diverged", "stalled", "slow", "undecided")
"""Outcomes of a seed that is not done, the first that occurs names that of all."""


def decide_seeds(verdicts: Mapping[int, Verdict], best: int, agreement: Agreement) -> Verdict:
    """One outcome for several seeds: converged only if all are, and all in the same place.

    Args:
        verdicts: on every seed by itself.
        best: the seed with the highest bound, whose parameters are returned.
        agreement: of the others with it.
    """
    outcomes = {seed: verdict.outcome for seed, verdict in verdicts.items()}
    reasons = [f"seed {best}, with the highest bound of {len(verdicts)} seeds, is returned"]
    reasons += [f"seed {best}: {reason}" for reason in verdicts[best].reasons]
    unsettled = {seed: outcome for seed, outcome in outcomes.items() if outcome in _WORST}
    if unsettled:
        named = ", ".join(f"seed {seed} {outcome}" for seed, outcome in unsettled.items())
        reasons.append(f"{len(outcomes) - len(unsettled)} of {len(outcomes)} seeds converged; not: {named}")
    else:
        reasons.append(f"all {len(outcomes)} seeds converged")
    reasons += _agreement(agreement)
    if not unsettled:
        if not agreement.disagree:
            return Verdict(outcomes[best], tuple(reasons))
        reasons.append(
            "the optimum that is found depends on the start: use a family that can hold several modes, or "
            "reparameterise the model; fit.seeds holds what each seed found"
        )
        return Verdict("multimodal", tuple(reasons))
    outcome = next(one for one in _WORST if one in unsettled.values())
    if unsettled.get(best) != outcome:
        seed = next(seed for seed, one in unsettled.items() if one == outcome)
        reasons += [f"seed {seed}: {reason}" for reason in verdicts[seed].reasons]
    return Verdict(outcome, tuple(reasons))


def _agreement(agreement: Agreement) -> list[str]:
    """Which seeds agree with the best, and by what."""
    lines = []
    for name, unit, compared in (
        ("bound below that of the best", "nats", agreement.shortfall),
        ("posterior mean away from that of the best", "standard deviations", agreement.distance),
    ):
        known = {seed: e.low for seed, e in compared.items() if e.low is not None}
        if known:
            furthest = max(known, key=lambda seed: known[seed])
            lines.append(f"largest distance between seeds, {name}: {show(compared[furthest], unit)}, seed {furthest}")
        elif compared:
            lines.append(f"{name}: {show(next(iter(compared.values())))}")
    if agreement.disagree:
        named = ", ".join(map(str, agreement.disagree))
        lines.append(
            f"found something else than seed {agreement.best}: seed {named} (a bound lower by more than the tolerance, "
            f"or a mean more than {FAR:g} standard deviations away)"
        )
    return lines


_ADVICE: dict[Outcome, str] = {
    "slow": "give it more steps, or a larger step size",
    "stalled": "lower the step size, let it decay, or use more particles",
    "undecided": "give it more steps; if that does not settle it, raise the tolerance",
}


def _why_none(evidence: Evidence) -> str:
    return "stopped by the user before the first one" if evidence.interrupted else "run more steps"


def _worst_fall(evidence: Evidence, tolerance: float) -> float | None:
    """Largest fall of the bound over one of the last windows that is significantly above the tolerance, negative."""
    recent = [c.improvement for c in evidence.checks[-DOUBLINGS:]]
    return min(
        (e.value for e in recent if e.value is not None and e.high is not None and e.high < -tolerance), default=None
    )


def _not_done(evidence: Evidence, tolerance: float) -> Outcome:
    """Stalled, slow or undecided.

    At a noise floor the iterates wander: the paired improvement from one to the next is large and of either sign. So a
    gain counts as progress only where none of the last windows lost as significantly, and at a plateau only where the
    window before gained as well.
    """
    last, before = evidence.checks[-1], [check.improvement for check in evidence.checks[-2:-1]]
    wanders = _worst_fall(evidence, tolerance) is not None
    chance = evidence.trend == "plateau" and any(e.low is not None and e.low <= tolerance for e in before)
    improving = is_better(last.improvement, tolerance) and not (wanders or chance)
    far = last.gap.low is None or last.gap.low > tolerance
    flat = evidence.trend == "plateau" or (wanders and evidence.trend != "decaying")
    if flat and last.improvement.value is not None and not improving and far:
        return "stalled"
    if improving or (evidence.trend == "decaying" and far):
        return "slow"
    return "undecided"
