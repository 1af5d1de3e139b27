"""``fit(num_seeds=S)``: every seed is the fit of that seed alone, and the verdict is over all of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import bbvi_conv as bc
from bbvi_conv.archive import monitor_csv
from bbvi_conv.checkpoint import pack
from bbvi_conv.cli import app
from bbvi_conv.model_file import load_model
from bbvi_conv.monitor import Strata
from bbvi_conv.monitor.state import columns, from_rows, to_rows

AMORTIZED = Path(__file__).parent / "files" / "amortized.py"
QUICK: dict[str, Any] = {
    "progress": False,
    "window": 100,
    "khat_draws": 100,
    "num_gradients": 8,
    "strata": Strata(20, 0.3),
}


def normal_mean(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def rows() -> Tensor:
    return 1.0 + torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def two_signs(y: Tensor) -> None:
    """The data tell |z|, but not its sign."""
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z.abs(), 1.0), obs=y)


def one_sign(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.randn(()) - 0.7)
    scale = pyro.param("scale", torch.tensor(0.3), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


@pytest.fixture(scope="module")
def signs(tmp_path_factory: pytest.TempPathFactory) -> tuple[bc.Fit, Path]:
    """Three seeds that end in two places, and their run directory."""
    out = tmp_path_factory.mktemp("signs") / "run"
    y = 2.0 + torch.randn(10, generator=torch.Generator().manual_seed(0))
    return bc.fit(two_signs, one_sign, (y,), num_seeds=3, max_steps=1000, out=out, **QUICK), out


def assert_same_run(seed: bc.Fit, alone: bc.Fit) -> None:
    """The same run to rounding: iterates, end, returned parameters, checks, outcome."""
    assert seed.state.step == alone.state.step
    assert seed.state.done == alone.state.done
    for got, wanted in zip(seed.state.carry.flat(), alone.state.carry.flat(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(seed.x, alone.x, rtol=1e-9, atol=1e-10)
    assert [check.step for check in seed.state.checks] == [check.step for check in alone.state.checks]
    for check, wanted_check in zip(seed.state.checks, alone.state.checks, strict=True):
        assert check.bound.value == pytest.approx(wanted_check.bound.value, rel=1e-9)
        assert check.gap.available == wanted_check.gap.available
        if check.gap.available:
            assert check.gap.value == pytest.approx(wanted_check.gap.value, rel=1e-5, abs=1e-9)
    assert seed.verdict.outcome == alone.verdict.outcome


# ---- the law ----


def test_every_seed_is_the_fit_of_that_seed_alone() -> None:
    """Some are done at an earlier window than others, and go no further."""
    settings = {**QUICK, "tol": 0.004, "max_steps": 400}
    fit = bc.fit(normal_mean, args=(rows(),), num_seeds=3, seed=5, **settings)
    ends = {one.state.step for one in fit.seeds}
    assert len(ends) > 1  # power: they do not all end together
    for s, seed in enumerate(fit.seeds):
        assert_same_run(seed, bc.fit(normal_mean, args=(rows(),), seed=5 + s, **settings))
    assert not torch.equal(fit.seeds[0].x, fit.seeds[1].x)
    assert torch.equal(fit.x, fit.seeds[fit.best].x)
    looked = [[look.step for look in one.monitor.looks] for one in fit.state.seeds]
    least = min(map(len, looked))
    assert all(steps[:least] == looked[0][:least] for steps in looked)
    assert fit.verdict.numbers["gradient_norm_sq"]["over"] == "over 3 seeds"


def test_one_seed_is_what_it_was() -> None:
    fit = bc.fit(normal_mean, args=(rows(),), seed=5, max_steps=150, tol=1e-9, **QUICK)
    assert fit.seeds == (fit,)
    assert fit.state.others == ()
    assert fit.state.carry.step.dim() == 0
    assert "seeds" not in fit.verdict.numbers
    assert fit.verdict.numbers["gradient_norm_sq"]["over"] == "this run"
    assert not any(name.startswith("seed") for name in pack(fit.state)[0])


def test_a_model_file_is_run_again_for_the_networks_of_every_seed(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    single = "torch.nn.Linear(4, 4), torch.nn.Linear(2, 4)"
    text = AMORTIZED.read_text(encoding="utf-8")
    assert single in text
    path.write_text(text.replace(single, single.replace("4)", "4).double()")), encoding="utf-8")

    def run(seed: int, **settings: Any) -> bc.Fit:
        file = load_model(str(path), seed=seed)
        batch, source = bc.Minibatch(16, plate="data"), bc.ModelSource(str(file.path))
        more = {**QUICK, "minibatch": batch, "dtype": torch.float64, "max_steps": 60, "tol": 1e-9, **settings}
        return bc.fit(file.model, file.guide, file.args, seed=seed, source=source, **more)

    fit, alone = run(3, num_seeds=2), run(4)
    assert_same_run(fit.seeds[1], alone)
    assert (fit.seeds[0].x - fit.seeds[1].x).norm() > 0.5


def test_the_command_line_takes_seeds(tmp_path: Path) -> None:
    options = ["--seeds", "2", "--seed", "3", "--steps", "5", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["fit", "conjugate_gaussian", *options])
    assert result.exit_code == 3
    assert "of 2 seeds, is returned" in result.output
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert [one["seed"] for one in verdict["seeds"]["each"]] == [3, 4]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["num_seeds"] == 2


def test_networks_handed_over_are_made_anew_for_later_seeds_and_end_trained() -> None:
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(4, 4), nn.Linear(2, 4)
    frozen = nn.Linear(4, 4).requires_grad_(False)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z) + frozen(torch.ones(4)), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    start, kept, states = decoder.weight.detach().clone(), frozen.weight.clone(), []
    fit = bc.fit(
        model, guide, (x,), num_seeds=3, minibatch=bc.Minibatch(8, plate="data"), max_steps=5, on_look=states.append,
        **QUICK,
    )  # fmt: skip
    begun = [fit.program.params(one.carry.x)["theta"] for one in states[0].seeds]
    weights = [next(value for name, value in theta.items() if name.endswith("weight")) for theta in begun]
    assert states[0].step == 0
    assert torch.equal(weights[0], start)
    assert (weights[1] - start).norm() > 0.1
    assert (weights[2] - weights[1]).norm() > 0.1
    assert torch.equal(frozen.weight, kept)
    found = fit.program.params(fit.x)["theta"]
    assert any(torch.equal(value, decoder.weight) for value in found.values())  # those of the best


# ---- the verdict ----


def test_seeds_that_end_in_two_places_are_multimodal(signs: tuple[bc.Fit, Path]) -> None:
    fit, _ = signs
    assert fit.verdict.outcome == "multimodal"
    means = [float(one.constrained_params["loc"]) for one in fit.seeds]
    assert all(abs(abs(mean) - 1.7) < 0.1 for mean in means)
    apart = {s for s, mean in enumerate(means) if mean * means[fit.best] < 0}
    assert apart  # power: there are two places
    assert set(fit.verdict.numbers["seeds"]["disagree"]) == apart
    assert all(one.verdict.outcome == "converged" for one in fit.seeds)  # none of them knows of the others
    assert "there is more than one optimum" in str(fit.verdict)


def test_seeds_that_agree_have_converged() -> None:
    fit = bc.fit(normal_mean, args=(rows(),), num_seeds=3, **{**QUICK, "khat_draws": 2000})
    assert fit.verdict.outcome == "converged"
    assert fit.verdict.numbers["seeds"]["disagree"] == []
    assert "all 3 seeds converged" in str(fit.verdict)
    each = fit.verdict.numbers["seeds"]["each"]
    assert [one["seed"] for one in each] == [0, 1, 2]
    bounds = [one["bound"]["value"] for one in each]
    assert fit.verdict.numbers["bound"]["value"] == bounds[fit.best]


def test_a_seed_that_diverged_is_named_and_not_returned() -> None:
    def half(y: Tensor) -> None:
        """Who starts above zero is drawn to where it is not finite."""
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        inside = torch.where(z > 0.0, 20.0 * z, -50.0 * (z + 1.0) ** 2)
        pyro.factor("wall", torch.where(z > 3.0, (3.0 - z).sqrt(), inside))

    def narrow(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(()).sign())
        scale = pyro.param("scale", torch.tensor(0.05), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale))

    fit = bc.fit(half, narrow, (torch.tensor(0.0),), num_seeds=8, max_steps=150, tol=1e-9, **QUICK)
    frozen = [s for s, one in enumerate(fit.state.seeds) if one.frozen]
    going = [one.step for one in fit.state.seeds if not one.frozen]
    assert 0 < len(frozen) < 7  # power
    assert going == [150] * len(going)
    assert fit.best not in frozen
    assert fit.verdict.outcome == "diverged"
    assert all(f"seed {s} diverged" in str(fit.verdict) for s in frozen)
    assert "site 'wall' is not finite" in str(fit.verdict)
    assert fit.verdict.numbers["gradient_norm_sq"]["over"] == f"over {len(going)} seeds"
    assert fit.to_arviz(10).posterior["chain"].size == len(going)


def test_what_cannot_be_shared_is_refused() -> None:
    growing = bc.GrowingParticles(bc.IWAE(2), stop=8, snr=0.5)
    with pytest.raises(ValueError, match="GrowingParticles with snr follows the signal of one run"):
        bc.fit(normal_mean, args=(rows(),), objective=growing, num_seeds=2, **QUICK)
    with pytest.raises(ValueError, match="num_seeds must be at least 1"):
        bc.fit(normal_mean, args=(rows(),), num_seeds=0, **QUICK)


# ---- what is left behind ----


def plain(fit: bc.Fit) -> dict[str, Any]:
    return {name: value for name, value in fit.verdict.to_json().items() if name != "seconds"}


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    settings = {**QUICK, "tol": 1e-9, "max_steps": 150, "num_seeds": 2}
    whole = bc.fit(normal_mean, args=(rows(),), **settings)
    looks = 0

    def stop(state: bc.FitState) -> None:
        nonlocal looks
        looks += 1
        if looks == 9:
            raise KeyboardInterrupt

    part = bc.fit(normal_mean, args=(rows(),), out=tmp_path / "run", on_look=stop, **settings)
    assert 0 < part.state.step < 150
    again = bc.load(tmp_path / "run", model=normal_mean, args=(rows(),)).resume(progress=False)
    (mine, meta), (theirs, their_meta) = pack(again.state), pack(whole.state)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert {**meta, "seconds": None} == {**their_meta, "seconds": None}
    assert plain(again) == plain(whole)
    further = again.resume(20, progress=False)
    assert [one.step for one in further.state.seeds] == [170, 170]


def test_the_run_directory_holds_every_seed(signs: tuple[bc.Fit, Path]) -> None:
    fit, out = signs
    with (out / "monitor.csv").open() as file:
        header, *cells = csv.reader(file)
    assert header == ["seed", *columns()]
    for s, one in enumerate(fit.state.seeds):
        own = [row for row in cells if row[0] == str(s)]
        assert from_rows(header, own) == one.monitor
    tables = [to_rows(one.monitor) for one in fit.state.seeds]
    assert monitor_csv(columns(), tables, 0) == (out / "monitor.csv").read_bytes().decode()
    report = (out / "report.html").read_text()
    assert "<h2>Seeds</h2>" in report
    assert f"{fit.best}, returned" in report
    loaded = bc.load(out, model=two_signs, guide=one_sign, args=fit.program.args)
    assert loaded.best == fit.best
    assert plain(loaded) == plain(fit)


def test_every_seed_is_a_chain_and_r_hat_sees_two_places(signs: tuple[bc.Fit, Path]) -> None:
    import xarray

    fit, out = signs
    with xarray.open_datatree(out / "posterior.nc") as tree:
        z = tree["posterior"]["z"].load()
    assert z.dims == ("chain", "draw")
    assert z.coords["chain"].to_numpy().tolist() == [0, 1, 2]
    for s, one in enumerate(fit.seeds):
        assert one.sample(1000)["z"].tolist() == pytest.approx(z.to_numpy()[s].tolist())
        assert float(one.to_arviz(10).posterior["chain"].size) == 1
    from arviz_stats import rhat

    assert float(rhat(fit.to_arviz(500).posterior["z"].to_numpy())) > 1.5


def test_figures_are_over_all_seeds(signs: tuple[bc.Fit, Path]) -> None:
    fit, _ = signs
    norm = fit.plot("gradient_norm")
    assert "over 3 seeds" in norm.get_suptitle()
    labels = [text for axis in norm.axes for text in axis.get_legend_handles_labels()[1]]
    assert "running mean of one seed" in labels
    bound = fit.plot("bound").axes[0]
    assert "range of the seeds" in bound.get_legend_handles_labels()[1]
    mean = bound.get_lines()[0].get_ydata()
    first = [one.losses[0][2] for one in fit.state.seeds]
    assert mean[0] == pytest.approx(-sum(first) / 3)
    assert "the best of 3" in fit.plot("gap").get_suptitle()
    fit.plot("rate").draw_without_rendering()
