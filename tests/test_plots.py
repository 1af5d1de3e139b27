"""What the figures draw is what the run holds."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import _pylab_helpers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.model_file import load_model
from bbvi_conv.monitor import MonitorState, rates, running_means, series
from bbvi_conv.monitor.intervals import unavailable
from bbvi_conv.plots import DPI, KINDS, plot

MODELS = Path(__file__).parents[1] / "models"


def factor_model(x: Tensor) -> None:
    mean = pyro.param("mean", torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mean + z, 0.5), obs=x)


def factor_guide(x: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 0.5))


@pytest.fixture(scope="module")
def fit() -> Any:
    conjugate = load_model(str(MODELS / "conjugate_gaussian.py"))
    args = conjugate.model, None, conjugate.args
    return bc.fit(*args, max_steps=400, window=100, tol=1e-6, khat_draws=100, progress=False)


@pytest.fixture(scope="module")
def amortized() -> Any:
    x = torch.randn(40, generator=torch.Generator().manual_seed(0))
    return bc.fit(
        factor_model,
        factor_guide,
        x,
        minibatch=bc.Minibatch(8, plate="data"),
        max_steps=150,
        window=50,
        tol=1e-9,
        khat_draws=100,
        progress=False,
    )


def labelled(axis: Axes, start: str) -> Any:
    return next(line for line in axis.get_lines() if str(line.get_label()).startswith(start))


def changed(fit: Any, **state: Any) -> Any:
    """The same fit with another state."""
    return SimpleNamespace(state=fit.state._replace(**state), settings=fit.settings, run=fit.run)


def words(figure: Figure) -> str:
    figure.draw_without_rendering()
    texts = figure.findobj(matplotlib.text.Text)
    return " ".join(" ".join(text.get_text().split()) for text in texts)


@pytest.fixture(autouse=True)
def no_global_state() -> Iterator[None]:
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    yield
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend
    assert not _pylab_helpers.Gcf.figs


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_renders(fit: Any, amortized: Any, kind: str) -> None:
    for each in (fit, amortized):
        figure = each.plot(kind)
        assert figure.dpi == DPI == 150
        for axis in figure.axes:
            assert "step" in axis.get_xlabel()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        assert len(buffer.getvalue()) > 20_000  # a blank page of this size has 5 kB


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_run_without_a_look_says_so(fit: Any, kind: str) -> None:
    figure = plot(changed(fit, monitor=MonitorState(), checks=(), losses=()), kind)
    assert "yet" in words(figure)


def test_unknown_kinds_are_refused(fit: Any) -> None:
    with pytest.raises(
        ValueError, match=r"unknown kind of plot 'trace'; choose one of gradient_norm, bound, gap, rate"
    ):
        plot(fit, "trace")


def test_gradient_norm_draws_the_running_mean(fit: Any) -> None:
    run = series(fit.state.monitor)
    assert run is not None
    (axis,) = plot(fit, "gradient_norm").axes
    means = running_means(run.lengths, run.values)
    line = labelled(axis, "running mean")
    np.testing.assert_array_equal(line.get_xdata(), run.stops[means > 0])
    np.testing.assert_array_equal(line.get_ydata(), means[means > 0])
    curve = labelled(axis, "envelope")
    n = np.asarray(curve.get_xdata())
    np.testing.assert_allclose(np.diff(np.asarray(curve.get_ydata()) / (np.log(n) / np.sqrt(n))), 0.0, atol=1e-6)
    meets = np.interp(curve.get_xdata()[0], line.get_xdata(), line.get_ydata())
    assert curve.get_ydata()[0] == pytest.approx(meets)
    below = int((run.values <= 0).sum())
    marked = [line for line in axis.get_lines() if line.get_label() == "U below 0 (noise)"]
    assert (len(marked[0].get_xdata()) if marked else 0) == below


def test_negative_norms_are_marked_not_dropped(fit: Any) -> None:
    looks = fit.state.monitor.looks
    flipped = looks[3]._replace(total=looks[3].total._replace(value=-0.5))
    monitor = fit.state.monitor._replace(looks=(*looks[:3], flipped, *looks[4:]))
    run = series(monitor)
    assert run is not None
    (axis,) = plot(changed(fit, monitor=monitor), "gradient_norm").axes
    below = labelled(axis, "U below 0")
    assert len(below.get_xdata()) == int((run.values <= 0).sum()) >= 1
    assert float(looks[3].step + 1) in below.get_xdata()


def test_theta_and_phi_stand_apart(amortized: Any, fit: Any) -> None:
    figure = plot(amortized, "gradient_norm")
    assert [a.get_title() for a in figure.axes] == ["all parameters", "generative (theta)", "variational (phi)"]
    assert "per datum" in figure.axes[0].get_ylabel()
    for axis, name in zip(figure.axes, ("total", "theta", "phi"), strict=True):
        run = series(amortized.state.monitor, name)
        assert run is not None
        means = running_means(run.lengths, run.values)
        np.testing.assert_array_equal(labelled(axis, "running mean").get_ydata(), means[means > 0])
    assert "per datum" not in plot(fit, "gradient_norm").axes[0].get_ylabel()


def test_bound_is_minus_the_loss(fit: Any, amortized: Any) -> None:
    for each in (fit, amortized):
        line = labelled(plot(each, "bound").axes[0], "training")
        np.testing.assert_allclose(line.get_ydata(), [-loss for _, _, loss in each.state.losses])
    total = amortized.program.total
    bars = plot(amortized, "bound").axes[0].containers[0]
    np.testing.assert_allclose(bars[0].get_ydata(), [c.bound.value / total for c in amortized.state.checks])
    assert "nats per datum" in plot(amortized, "bound").axes[0].get_ylabel()


def test_gap_draws_every_check_and_the_tolerance(fit: Any) -> None:
    figure = plot(fit, "gap")
    (axis,) = figure.axes
    assert labelled(axis, "tolerance").get_ydata()[0] == fit.settings.tol
    bars = {container.get_label(): container for container in axis.containers}
    gaps = [c.gap for c in fit.state.checks if c.gap.available]
    np.testing.assert_allclose(bars["remaining gap"][0].get_ydata(), [g.value for g in gaps])
    segments = bars["remaining gap"][2][0].get_segments()
    np.testing.assert_allclose([s[:, 1] for s in segments], [[g.low, g.high] for g in gaps], atol=1e-12)
    low, high = axis.get_ylim()
    assert low < 0 < fit.settings.tol < high


def test_what_is_not_available_is_explained(fit: Any) -> None:
    first = fit.state.checks[0]
    assert not first.improvement.available
    assert first.improvement.reason in words(plot(fit, "gap"))
    checks = tuple(c._replace(gap=unavailable("the Hessian is not positive definite: go on")) for c in fit.state.checks)
    figure = plot(changed(fit, checks=checks), "gap")
    assert "the Hessian is not positive definite: go on" in words(figure)
    assert "remaining gap" not in [c.get_label() for c in figure.axes[0].containers]


def test_rate_draws_the_fitted_slopes(fit: Any) -> None:
    run = series(fit.state.monitor)
    assert run is not None
    found = rates(run)
    assert found.envelope_slope.value is not None
    figure = plot(fit, "rate")
    for axis, start, value in (
        (figure.axes[0], "slope", found.envelope_slope.value),
        (figure.axes[1], "exponent of the last", found.exponent.value),
    ):
        if value is None:
            continue
        line = labelled(axis, start)
        drawn = np.diff(np.log(line.get_ydata())) / np.diff(np.log(line.get_xdata()))
        np.testing.assert_allclose(drawn, value, rtol=1e-6)
    assert found.plateau.trend in words(figure)
