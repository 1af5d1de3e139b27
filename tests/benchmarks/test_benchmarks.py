"""The sides of a case pose the same problem, the clock's statistics are right, a tiny case runs to its table."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from typer.testing import CliRunner

import bbvi_conv as bc

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The checkout is on the path for these tests, and images are simulated."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delenv("BBVI_CONV_DATA", raising=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="(jax|numpyro|flax)")
        yield


@pytest.fixture
def peers() -> None:
    """NumPyro, or a skip."""
    pytest.importorskip("numpyro", reason="NumPyro is not installed: make benchmark-deps installs it")


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("name", ["logistic-minibatch", "eight-schools", "vae"])
def test_all_sides_pose_the_same_problem(name: str) -> None:
    """At the same parameters, rows and latents: ours, Pyro's Trace_ELBO with Pyro's guide, NumPyro's densities.

    Every case is checked so before it is timed; here one with rows, one with a packed vector, one with networks.
    """
    from benchmarks.agree import Disagreement, check
    from benchmarks.cases import CASES

    case = CASES[name]()
    assert math.isfinite(check(name, case).ours)
    if name == "eight-schools":  # power: another prior of one site is found out

        def other(y, sigma):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.1))
            tau = pyro.sample("tau", dist.HalfCauchy(5.0))
            with pyro.plate("school", len(y)):
                theta = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)

        with pytest.raises(Disagreement, match="case wrong: NumPyro's loss"):
            check("wrong", replace(case, model=other))


@pytest.mark.usefixtures("peers")
def test_numpyros_importance_weighted_bound_is_ours() -> None:
    """Means of the very losses that are timed, at the same parameters, on the same rows."""
    import jax

    from bbvi_conv.engine import Calculus
    from bbvi_conv.engine.streams import Feed
    from bbvi_conv.program.trace import TracedLogWeights
    from benchmarks.agree import numpyro_start
    from benchmarks.cases.vae import vae

    case = vae(bc.IWAE(5), hidden=8, latent=2, batch=4, rows=16)
    program = case.program()
    x = program.initial()
    rows = torch.tensor([[3, 1, 7, 2]])
    count = 400
    noise = program.layout.draw(torch.Generator().manual_seed(0), count, 5, dtype=torch.float32)
    feed = Feed(noise, rows.expand(count, -1))
    traced = TracedLogWeights(program)
    own = Calculus(program, bc.IWAE(5), traced, 1.0).losses(x, feed).numpy()
    twin = case.twin()
    params = numpyro_start(case, twin, case.params(program, x))

    @jax.jit
    @jax.vmap
    def loss(key):
        return twin.loss.loss(key, params, twin.model, twin.guide, *twin.args, rows=rows[0].numpy())

    theirs = jax.device_get(loss(jax.random.split(jax.random.PRNGKey(0), count)))
    error = ((own.var() + theirs.var()) / count) ** 0.5
    looser = Calculus(program, bc.ELBO(5), traced, 1.0).losses(x, feed).numpy()
    assert abs(own.mean() - theirs.mean()) < 4 * error
    assert looser.mean() - own.mean() > 8 * error  # power: the bound of one draw is told apart


def test_medians_and_spreads(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.timing import interleave, ratio, summary

    assert summary([3.0, 1.0, 2.0]).median == 2.0
    assert ratio([2.0, 40.0, 6.0], [1.0, 20.0, 3.0]) == (2.0, 0.0)  # a slow round slows both
    order: list[str] = []
    noisy = iter([1.0, 9.0] * 20)

    def contender(name: str):
        def turn(steps: int) -> float:
            order.append(f"{name}{steps}")
            return next(noisy) if name == "a" else 1.0

        return turn

    seconds, attempts = interleave(
        {"a": contender("a"), "b": contender("b")}, {"a": 2, "b": 3}, rounds=4, pair=("a", "b"), attempts=2
    )
    assert attempts == 2  # the spread was too large
    assert order[:6] == ["a2", "b3", "a2", "b3", "b3", "a2"]  # warmed, then nobody always goes first
    assert len(seconds["a"]) == 4


@pytest.mark.usefixtures("peers")
def test_a_tiny_case_runs_to_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import __main__ as shell
    from benchmarks import measure as measuring
    from benchmarks.cases.regression import logistic

    monkeypatch.setitem(shell.CASES, "tiny", lambda: replace(logistic(20, 2), steps=8, pyro_steps=2))
    threads = torch.get_num_threads()

    def here(arguments: list[str], *, threads: int) -> object:  # the case is this process's own
        out = tmp_path / "row.json"
        result = CliRunner().invoke(shell.app, [*arguments, "--json", str(out)], catch_exceptions=False)
        assert result.exit_code == 0
        return json.loads(out.read_text())

    assert measuring.fresh is shell.fresh
    monkeypatch.setattr(shell, "fresh", here)
    out, page = tmp_path / "speed.json", tmp_path / "performance.md"
    page.write_text("# Performance\n\n<!-- speed: begin -->\nold\n<!-- speed: end -->\n\nKept.\n")
    options = ["--threads", "1", "--rounds", "2", "--run-steps", "30", "--json", str(out), "--table", str(page)]
    try:
        result = CliRunner().invoke(shell.app, ["speed", "--cases", "tiny", *options], catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert not row["missing"]
    asked = "case ours_us numpyro_scan_us numpyro_run_us pyro_us ratio_numpyro_scan ratio_pyro threads spread"
    assert set(asked.split()) <= set(row)
    assert row["ratio_pyro"] == pytest.approx(row["pyro_us"] / row["ours_us"], rel=0.9)
    assert 0 < row["monitor_share"] < 1
    text = page.read_text()
    assert "| tiny | 1 |" in text
    assert "old" not in text
    assert text.endswith("Kept.\n")


def test_an_unknown_case_is_named() -> None:
    from benchmarks import __main__ as shell

    result = CliRunner().invoke(shell.app, ["speed", "--cases", "nonsense"])
    assert result.exit_code == 2
    assert "nonsense" in result.output
