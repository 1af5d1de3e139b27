"""Laws of the state: pure, replayable, read back from a CSV to the bit; and gradient descent seen through it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bbvi_conv.monitor import (
    MonitorState,
    Strata,
    columns,
    from_rows,
    gram_matrix,
    look,
    series,
    summary,
    to_rows,
    update,
)
from bbvi_conv.monitor.state import LATEST, signal_to_noise

STRATA = Strata(20, 0.2)


def monitored(count: int, groups: tuple[str, ...] = ("theta", "phi"), seed: int = 0) -> MonitorState:
    generator, state = torch.Generator().manual_seed(seed), MonitorState()
    for index in range(count):
        step = STRATA.random_step(seed, index)
        grams = {
            name: gram_matrix(1 / (1 + index) + torch.randn(8, 3, generator=generator, dtype=torch.float64))
            for name in groups
        }
        state = update(state, look(step, index, STRATA.bounds(index), grams, bound=-1.0 / 3.0 - index))
    return state


def test_update_is_pure_and_replays() -> None:
    states = [MonitorState()]
    whole = monitored(6)
    for entry in whole.looks:
        states.append(update(states[-1], entry))
    assert [len(state.looks) for state in states] == list(range(7))
    assert states[-1] == whole == monitored(6)
    assert monitored(6, seed=1) != whole


@pytest.mark.parametrize("groups", [("phi",), ("theta", "phi"), ("theta", "phi", "shared")])
def test_a_csv_file_gives_back_the_same_state(groups: tuple[str, ...]) -> None:
    state = monitored(9, groups)
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(columns())
    writer.writerows(to_rows(state)[:4])
    writer.writerows(to_rows(state, since=4))  # appended later: the same rows
    file.seek(0)
    header, *rows = csv.reader(file)
    assert from_rows(header, rows) == state
    assert summary(from_rows(header, rows)) == summary(state)
    empty = "gradient_norm_sq_theta" if "theta" not in groups else None
    if empty:
        assert {row[header.index(empty)] for row in rows} == {""}


def test_rows_hold_the_figures_under_their_names() -> None:
    state = monitored(5)
    row = dict(zip(columns(), to_rows(state)[-1], strict=True))
    figures = summary(state)
    assert row["step"] == state.looks[-1].step
    assert row["stratum_length"] == state.looks[-1].length
    assert row["gradient_norm_sq_phi"] == figures.latest["phi"].value
    assert row["running_mean_total"] == figures.gradient_norm_sq["total"].value
    assert row["running_mean_theta_high"] == figures.gradient_norm_sq["theta"].high
    assert row["trace_sigma_total"] == pytest.approx(row["trace_sigma_theta"] + row["trace_sigma_phi"], rel=1e-12)
    assert row["bound_error"] is None
    assert row["snr_phi"] == math.sqrt(max(row["gradient_norm_sq_phi"], 0.0) / row["trace_sigma_phi"])
    assert row["training_trace_sigma_total"] == pytest.approx(row["trace_sigma_total"], rel=1e-12)
    assert len(columns()) == len(set(columns()))


def test_signal_to_noise_is_that_of_the_estimator_that_trains() -> None:
    """U by a quiet estimator, the noise by another: the ratio is the root of their quotient."""
    generator, inside, wide = torch.Generator().manual_seed(5), 0, []
    for _ in range(200):
        state = MonitorState()
        for index in range(LATEST + 2):
            mean = 0.3 if index > 1 else 50.0  # the first two looks are no longer among the latest
            grams = {"phi": gram_matrix(mean + torch.randn(32, 4, generator=generator, dtype=torch.float64))}
            noise = {"phi": 36.0}
            entry = look(STRATA.bounds(index)[0], index, STRATA.bounds(index), grams, noise=noise)
            state = update(state, entry)
        found = signal_to_noise(state, "phi")
        inside += found.low <= math.sqrt(4 * 0.09 / 36.0) <= found.high
        wide.append(found.high - found.low)
    assert inside / 200 > 0.95 - 4.5 * math.sqrt(0.95 * 0.05 / 200)
    assert sorted(wide)[100] < 0.12  # power: about the ratio itself
    assert state.looks[-1].signal_to_noise("total") == state.looks[-1].signal_to_noise("phi")
    assert "no theta parameters" in signal_to_noise(state, "theta").reason
    assert "no look" in signal_to_noise(MonitorState(), "phi").reason
    still = update(MonitorState(), look(0, 0, STRATA.bounds(0), {"phi": torch.ones(4, 4)}))
    assert "no noise" in signal_to_noise(still, "phi").reason
    assert still.looks[0].signal_to_noise("phi") is None


def test_the_figures_of_the_groups_add_and_an_absent_group_has_a_reason() -> None:
    figures = summary(monitored(10))
    mean = figures.gradient_norm_sq
    assert mean["total"].value == pytest.approx(mean["theta"].value + mean["phi"].value, rel=1e-12)
    assert mean["shared"].value is None
    assert "no shared parameters" in mean["shared"].reason
    assert figures.steps == STRATA.bounds(9)[1]
    assert json.loads(json.dumps(figures.to_json()))["label"] == "this run"
    nothing = summary(MonitorState())
    assert nothing.gradient_norm_sq["total"].value is None
    assert "no look" in nothing.rate.exponent.reason


def test_a_run_that_ends_inside_a_stratum_counts_the_steps_it_made() -> None:
    state = monitored(4)
    last = state.looks[-1]
    assert summary(state, steps=last.step + 1).steps == last.step + 1
    assert summary(state, steps=10**6).steps == summary(state).steps == last.start + last.length
    clipped, full = series(state, steps=last.step + 1), series(state)
    assert clipped is not None
    assert full is not None
    assert clipped.lengths[:-1].tolist() == full.lengths[:-1].tolist()
    with pytest.raises(ValueError, match="steps must be past the last look"):
        series(state, steps=last.step)


def test_bad_looks_and_tables_are_named() -> None:
    state = monitored(3)
    with pytest.raises(ValueError, match="without a gap"):
        update(state, monitored(5).looks[4])
    with pytest.raises(ValueError, match="is not in stratum 0"):
        look(1, 0, (0, 1), {"phi": torch.eye(4)})
    with pytest.raises(ValueError, match="unknown parameter groups"):
        look(0, 0, (0, 1), {"psi": torch.eye(4)})
    with pytest.raises(ValueError, match="unknown figure"):
        series(state, "psi")
    rows = to_rows(state)
    with pytest.raises(ValueError, match="lacks the columns"):
        from_rows(columns()[1:], [row[1:] for row in rows])
    with pytest.raises(ValueError, match="row 2 of the monitor's table has 3 cells"):
        from_rows(columns(), [*rows[:2], rows[2][:3]])
    with pytest.raises(ValueError, match=r"row 1 .* without a gap"):
        from_rows(columns(), [rows[0], rows[2]])
    with pytest.raises(ValueError, match=r"row 0 .* cannot be read"):
        from_rows(columns(), [["x", *rows[0][1:]]])
    with pytest.raises(ValueError, match="gradient_norm_sq_total is empty"):
        from_rows(
            columns(), [[None if "total" in name else cell for name, cell in zip(columns(), rows[0], strict=True)]]
        )


def descend(step_size: Callable[[int], float], steps: int, seed: int, j: int = 32) -> tuple[MonitorState, np.ndarray]:
    """SGD on 1/2 x'Ax in 10 dimensions with unit gradient noise, monitored; and the true ||Ax||^2 of every step."""
    rng, strata, curvature = np.random.default_rng(seed), Strata(), np.geomspace(1.0, 4.0, 10)
    iterate, state, truth, index = np.full(10, 10.0), MonitorState(), np.empty(steps), 0
    next_look, noise = strata.random_step(seed, 0), rng.standard_normal((steps, 10))
    for step in range(steps):
        gradient = curvature * iterate
        truth[step] = gradient @ gradient
        if step == next_look:
            fresh = torch.from_numpy(gradient + rng.standard_normal((j, 10)))
            state = update(state, look(step, index, strata.bounds(index), {"phi": gram_matrix(fresh)}))
            index += 1
            next_look = strata.random_step(seed, index)
        iterate = iterate - step_size(step + 1) * (gradient + noise[step])
    return state, truth


def test_descent_with_a_constant_step_stalls_and_with_a_decreasing_one_does_not() -> None:
    for seed in range(3):
        stalled, _ = descend(lambda n: 0.1, 20_000, seed)
        assert summary(stalled).rate.plateau.trend == "plateau"
        falling, _ = descend(lambda n: 0.4 / n**0.5, 20_000, seed, j=256)
        rate = summary(falling).rate
        assert rate.plateau.trend == "decaying"
        assert rate.exponent.low < -0.5 < rate.exponent.high  # ||grad||^2 follows the step size


@pytest.mark.parametrize("step_size", [0.1, 0.01])
def test_the_runs_figure_covers_the_mean_over_all_its_steps(step_size: float) -> None:
    inside = 0
    for seed in range(40):
        state, truth = descend(lambda n: step_size, 2_000, seed)
        figure = summary(state, steps=2_000)
        estimate = figure.gradient_norm_sq["total"]
        inside += estimate.low <= truth[: figure.steps].mean() <= estimate.high
    assert inside >= 33  # 38 expected, less four standard errors of a binomial share
