"""Held-out rows judge a fit: what they are asked, when they stop it, what is then returned, and how it is taken up."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

import bbvi_conv as bc
from bbvi_conv.checkpoint import pack, unpack
from bbvi_conv.cli import app
from bbvi_conv.engine.calculus import Calculus
from bbvi_conv.engine.streams import Stream
from bbvi_conv.model_file import ModelFile, load_model
from bbvi_conv.monitor.intervals import Estimate, unavailable
from bbvi_conv.monitor.judge import Check
from bbvi_conv.monitor.state import columns, from_rows
from bbvi_conv.monitor.trend import Plateau, Trend
from bbvi_conv.plots import plot
from bbvi_conv.program.build import build
from bbvi_conv.report import number_rows
from bbvi_conv.run_directory import RunDirectory
from bbvi_conv.verdict import DOUBLINGS, Evidence, decide, is_over

FILE = Path(__file__).parent / "files" / "overfit.py"
FIRST = unavailable("needs two windows of steps: run more steps")


def loaded() -> ModelFile:
    """The file with new networks."""
    return load_model(str(FILE), held_out=True)


def run_of(found: ModelFile, **changes: Any) -> bc.Fit:
    settings = {**found.defaults, "progress": False, "held_out": found.held_out, **changes}
    return bc.fit(found.model, found.guide, found.args, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[bc.Fit, Path]:
    """The fit of a model that overfits, judged on held-out rows, and its directory."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return run_of(loaded(), out=out, source=bc.ModelSource(str(FILE))), out


def bounds(fit: bc.Fit, x: Tensor, rows: Tensor, draws: int = 200) -> Tensor:
    """ELBO of each row at flat parameters ``x``, written out by hand: ``(rows,)``; always the same noise."""
    values = {name: value for group in fit.program.params(x).values() for name, value in group.items()}

    def network(name: str, inputs: Tensor) -> Tensor:
        first, second = ((values[f"{name}$$${i}.weight"], values[f"{name}$$${i}.bias"]) for i in (0, 2))
        return functional.linear(torch.tanh(functional.linear(inputs, *first)), *second)

    loc, log_scale = network("encoder", rows).chunk(2, -1)
    noise = torch.randn(draws, *loc.shape, generator=torch.Generator().manual_seed(99))
    logits = network("decoder", loc + log_scale.exp() * noise)
    shown = (rows * logits - functional.softplus(logits)).sum(-1).mean(0)
    return shown - 0.5 * (loc**2 + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(-1)


def test_a_model_that_overfits_is_stopped_and_its_best_window_returned(run: Any) -> None:
    fit, _ = run
    found = loaded()
    assert fit.state.step < found.defaults["max_steps"]
    assert fit.verdict.outcome == "stalled"
    told = " ".join(fit.verdict.reasons)
    assert "the model overfits, held-out data show" in told
    assert f"returned are the parameters of the window that ended at step {fit.state.best_step}" in told
    assert 0 < fit.state.best_step < fit.state.step
    last = fit.state.carry.x
    assert found.held_out is not None
    for rows, sign in ((found.held_out[0], 1.0), (found.args[0], -1.0)):  # better on unseen rows, worse on those seen
        gain = sign * (bounds(fit, fit.x, rows) - bounds(fit, last, rows))
        assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5
    by_hand = bounds(fit, fit.x, found.held_out[0])
    number = fit.verdict.numbers["held_out"]
    error = ((number["bound_per_datum"]["high"] - number["bound_per_datum"]["low"]) / 3.92) ** 2
    error += float(by_hand.var()) / len(by_hand)
    assert abs(number["bound_per_datum"]["value"] - float(by_hand.mean())) < 4 * error**0.5
    assert number["rows"] == len(by_hand)
    assert number["returned_step"] == fit.state.best_step


def test_held_out_rows_touch_nothing_but_the_judgement(run: Any) -> None:
    """The same iterates, looks and checks of gradients as a fit without them."""
    fit, _ = run
    other = run_of(loaded(), held_out=None, max_steps=fit.state.step)
    assert torch.equal(other.state.carry.x, fit.state.carry.x)
    assert tuple(look._replace(held_out=None) for look in fit.state.monitor.looks) == other.state.monitor.looks
    assert other.state.losses == fit.state.losses
    assert all(check.over_best is None and check.training is None for check in other.state.checks)
    assert "held_out" not in other.verdict.numbers


def test_looks_at_the_same_rows_agree_but_for_their_noise() -> None:
    """With the training rows as held-out ones, both estimate one gradient and one bound, each by draws of its own."""
    found = loaded()
    fit = run_of(found, held_out=found.args, max_steps=150, num_gradients=32)
    looks = [(one, one.held_out) for one in fit.state.monitor.looks if one.held_out is not None]
    assert len(looks) == len(fit.state.monitor.looks) > 5
    assert all(one.total.value != other.total.value for one, other in looks)
    for figure in ("theta", "phi", "total"):
        norms = [(one.norm(figure), other.norm(figure)) for one, other in looks]
        scores = [
            (a.value - b.value) / (a.standard_error**2 + b.standard_error**2) ** 0.5
            for a, b in norms
            if a is not None and b is not None
        ]
        assert sum(score**2 for score in scores) < 4 * len(scores)
    scores = [(a.bound - b.bound) / (a.bound_error**2 + b.bound_error**2) ** 0.5 for a, b in looks]  # type: ignore[operator]
    assert sum(score**2 for score in scores) < 4 * len(scores)


def test_the_table_of_the_looks_holds_them(run: Any) -> None:
    fit, out = run
    with (out / "monitor.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["seed", *columns(held_out=True)]
    assert from_rows(header, rows) == fit.state.monitor
    last = fit.state.monitor.looks[-1].held_out
    assert float(rows[-1][header.index("held_out_bound")]) == last.bound
    assert float(rows[-1][header.index("held_out_gradient_norm_sq_total")]) == last.total.value


def test_figures_and_report_show_both_lines(run: Any) -> None:
    fit, out = run
    unseen = fit.state.monitor.held_out
    lines = {line.get_label(): line for line in plot(fit, "bound").axes[0].get_lines()}
    drawn = lines["held-out rows, at every look"]
    assert drawn.get_ydata().tolist() == [look.bound for look in unseen.looks]
    assert drawn.get_xdata().tolist() == [look.step for look in unseen.looks]
    assert "training, mean of each chunk of steps" in lines
    for axis, group in zip(plot(fit, "gradient_norm").axes, ("total", "theta", "phi"), strict=True):
        (thin,) = (line for line in axis.get_lines() if line.get_label() == "running mean on held-out rows")
        lengths = [look.length for look in unseen.looks]
        sums = sum(n * look.norm(group).value for n, look in zip(lengths, unseen.looks, strict=True))
        assert thin.get_ydata()[-1] == pytest.approx(sums / sum(lengths), rel=1e-9)
    names = [row.name for row in number_rows(fit.verdict.numbers, fit.settings.tol)]
    text = (out / "report.html").read_text(encoding="utf-8")
    for name in ("bound, nats per datum", "improvement on held-out rows, nats", "squared gradient norm, held-out rows"):
        assert name in names
        assert name in text


# Taken up again


def assert_same(run: Path, other: Path) -> None:
    """Verdict, looks, settings and every tensor, to the last bit."""
    verdicts = [json.loads((path / "verdict.json").read_text()) for path in (run, other)]
    assert {**verdicts[0], "seconds": 0} == {**verdicts[1], "seconds": 0}
    for name in ("monitor.csv", "config.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    (mine, _), (theirs, _) = (RunDirectory.open(path).load_checkpoint() for path in (run, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_run_that_was_stopped_ends_in_the_same_bits(run: Any, tmp_path: Path) -> None:
    looks = 0

    def stop(state: bc.FitState) -> None:
        nonlocal looks
        looks += 1
        if state.step > 500 and looks > 5:  # after the window that will be the best, and after two checks against it
            raise KeyboardInterrupt

    first = run_of(loaded(), out=tmp_path / "run", source=bc.ModelSource(str(FILE)), on_look=stop)
    assert 500 < first.state.step < run[0].state.step
    again = bc.load(tmp_path / "run")
    assert again.run.held_out is not None
    assert torch.equal(again.x, first.x)
    assert torch.equal(again.resume(progress=False).x, run[0].x)
    assert_same(tmp_path / "run", run[1])


def test_the_command_line_uses_what_the_file_holds_out_and_runs_it_again(tmp_path: Path) -> None:
    def call(*arguments: object) -> str:
        result = CliRunner().invoke(app, [*map(str, arguments), "--quiet"])
        assert result.exit_code == 3, (result.output, result.exception)
        return result.stdout

    call("fit", FILE, "--steps", 60, "--out", tmp_path / "with")
    call("fit", FILE, "--steps", 60, "--no-held-out", "--out", tmp_path / "without")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("with", "without")]
    digest = configs[0].pop("held_out_sha256")
    assert len(digest) == 64
    assert digest != configs[0]["data_sha256"]
    assert configs[0] == configs[1]
    header = (tmp_path / "without" / "monitor.csv").read_text().splitlines()[0]
    assert header == ",".join(["seed", *columns()])
    assert call("rerun", tmp_path / "with", "--out", tmp_path / "again").splitlines()[-1] == "the same numbers"
    assert (tmp_path / "again" / "monitor.csv").read_bytes() == (tmp_path / "with" / "monitor.csv").read_bytes()


def test_a_run_made_in_python_asks_for_its_held_out_rows(tmp_path: Path) -> None:
    found = loaded()
    first = run_of(found, max_steps=30, out=tmp_path / "run")
    more = {"model": found.model, "guide": found.guide, "args": found.args}
    assert torch.equal(bc.load(tmp_path / "run", held_out=found.held_out, **more).x, first.x)
    with pytest.raises(ValueError, match="was judged on held-out data: give them as held_out"):
        bc.load(tmp_path / "run", **more)
    with pytest.raises(ValueError, match="held-out data are not those of the run"):
        bc.load(tmp_path / "run", held_out=found.args, **more)
    run_of(found, max_steps=30, held_out=None, out=tmp_path / "other")
    with pytest.raises(ValueError, match="has no held-out data"):
        bc.load(tmp_path / "other", held_out=found.held_out, **more)


def test_every_seed_is_judged_by_itself() -> None:
    """Side by side as alone: looks and checks at held-out rows have the noise of their own seed."""
    both = run_of(loaded(), num_seeds=2, max_steps=200, num_gradients=4)
    alone = run_of(loaded(), max_steps=200, num_gradients=4)
    one = both.seeds[0].state
    pairs = zip(one.checks[-1][5:], alone.state.checks[-1][5:], strict=True)
    assert all(mine[:3] == pytest.approx(theirs[:3], rel=1e-3) for mine, theirs in pairs)
    assert [look.held_out.bound for look in one.monitor.looks] == pytest.approx(
        [look.held_out.bound for look in alone.state.monitor.looks], rel=1e-5
    )
    other = both.seeds[1].state.monitor.held_out.looks
    assert all(a.bound != b.held_out.bound for a, b in zip(other, one.monitor.looks, strict=True))


# Data that are no rows go into a graph as constants


def scaled(x: Tensor, table: Tensor) -> None:
    mean = pyro.param("mean", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mean + z, 1.0), obs=x.float() + table.sum())


def scaled_guide(x: Tensor, table: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x.float(), 1.0))


def test_other_data_that_are_no_rows_are_not_those_of_training() -> None:
    """A table beside the rows is a constant of a traced graph: held-out rows have their own."""
    x, unseen = torch.arange(6.0), torch.tensor([2.0, -1.0])
    tables = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 0.25, 0.125])
    program = build(scaled, scaled_guide, (x, tables[0]), minibatch=bc.Minibatch(3, plate="data"), dtype=torch.float64)
    other = program.with_data((unseen, tables[1]))
    feed = Stream(other, 0, "evaluate", 1).once(0, 5)
    assert int(feed.rows.max()) < 2
    objective = bc.ELBO(1)
    traced, eager = Calculus.of(program, objective, 6.0), Calculus(program, objective, program.log_weights, 6.0)
    assert traced.traced
    at = program.initial()
    rows = unseen.double()[feed.rows]
    z = 0.3 * rows + feed.noise.normal.reshape(5, 3)
    normal = torch.distributions.Normal
    one = torch.tensor(1.0, dtype=torch.float64)
    log_p = normal(0.0, one).log_prob(z) + normal(0.5 + z, one).log_prob(rows + 0.875)
    wanted = -(log_p - normal(0.3 * rows, one).log_prob(z)).mean(1)
    for calculus in (traced, eager):
        torch.testing.assert_close(calculus.on(other).losses(at, feed), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "rows"), [("bernoulli_vae", 10_000), ("conv_vae", 3_000)])
def test_shipped_vaes_hold_out_test_images(name: str, rows: int) -> None:
    try:
        found = load_model(name, held_out=True)
    except ValueError as error:
        pytest.skip(str(error))
    minibatch = bc.Minibatch(4, plate="data")
    program = build(found.model, found.guide, found.args, minibatch=minibatch)
    assert found.held_out is not None
    other = program.with_data(found.held_out)
    assert other.total == rows
    feed = Stream(other, 0, "evaluate", 1).once(0, 3)
    at, normaliser = program.initial(), float(program.total)
    traced = Calculus.of(program, bc.ELBO(1), normaliser)
    assert traced.traced
    eager = Calculus(other, bc.ELBO(1), other.log_weights, normaliser)
    torch.testing.assert_close(traced.on(other).losses(at, feed), eager.losses(at, feed), rtol=1e-5, atol=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("held_out", "told"),
    [
        ((torch.zeros(5, 195),), r"argument 0 of held_out has shape \(5, 195\) where that of args has \(60, 196\)"),
        ((torch.zeros(5, 14, 14),), r"argument 0 of held_out has shape \(5, 14, 14\)"),
        ((), "held_out holds 0 positional arguments where args holds 1"),
        ((torch.zeros(5, 196), 3), "held_out holds 2 positional arguments where args holds 1"),
        (("rows",), "argument 0 of held_out is str where that of args is a tensor"),
        ((torch.zeros(5, 196, dtype=torch.uint8),), r"argument 0 of held_out is torch.uint8 where .* torch.float32"),
        ((torch.full((5, 196), float("nan")),), r"argument 0 of held_out holds nan at index \(0, 0\)"),
        ((torch.zeros(0, 196),), "held_out needs one row or more, as many in every argument of rows, got 0"),
    ],
)
def test_held_out_rows_that_are_none_are_refused(held_out: tuple[Any, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        run_of(loaded(), held_out=held_out, max_steps=5)


def test_arguments_of_rows_must_agree_on_their_number() -> None:
    x = torch.zeros(6)
    program = build(scaled, scaled_guide, (x, x), minibatch=bc.Minibatch(3, plate="data"))
    with pytest.raises(ValueError, match="got 4 in argument 0, 5 in argument 1"):
        program.with_data((torch.zeros(4), torch.zeros(5)))


def test_a_file_whose_held_out_is_wrong(tmp_path: Path) -> None:
    def write(ending: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text("def model(x): ...\ndef data(): return (1,)\n" + ending)
        return str(path)

    assert load_model(write("def held_out(): return (2,)\n"), held_out=True).held_out == (2,)
    assert load_model(write("def held_out(): 1 / 0\n")).held_out is None  # not run unless asked for
    assert load_model(write(""), held_out=True).held_out is None
    with pytest.raises(ValueError, match=r"its held_out\(\) returned int, not the tuple"):
        load_model(write("def held_out(): return 2\n"), held_out=True)
    with pytest.raises(ValueError, match=r"line 3: its held_out\(\) failed with ZeroDivisionError"):
        load_model(write("def held_out(): 1 / 0\n"), held_out=True)
    with pytest.raises(ValueError, match="its held_out is no function but int"):
        load_model(write("held_out = 3\n"), held_out=True)


# The stopping rule

TOL = 0.01
NONE, TINY, FAR = unavailable("not positive definite"), Estimate(0.002, 0.0, 0.005), Estimate(1.0, 0.8, 1.3)
GAIN, LOSS, VAGUE = Estimate(0.5, 0.4, 0.6), Estimate(-0.5, -0.6, -0.4), Estimate(0.0, -0.1, 0.1)
ZERO = Estimate(0.0, -0.001, 0.001)


def checks(*rows: tuple[Estimate, Estimate, Estimate, Estimate]) -> tuple[Check, ...]:
    """Of (gap, improvement, improvement over the best window on held-out rows, on training rows)."""
    return tuple(
        Check(500 * 2**i, gap, NONE, improvement, ZERO, over, training)
        for i, (gap, improvement, over, training) in enumerate(rows)
    )


START = (NONE, FIRST, FIRST, FIRST)
RULES: list[tuple[str, tuple[Check, ...], dict[str, Trend], bool, str]] = [
    ("still gaining", checks(START, (NONE, GAIN, GAIN, GAIN)), {"theta": "plateau", "phi": "plateau"}, False, "slow"),
    ("overfits", checks(START, (NONE, LOSS, LOSS, GAIN)), {"theta": "decaying", "phi": "decaying"}, True, "stalled"),
    ("overfits by small steps", checks(START, (NONE, VAGUE, LOSS, GAIN)), {"phi": "undecided"}, True, "stalled"),
    ("overfits at its optimum", checks(START, (TINY, LOSS, LOSS, GAIN)), {"phi": "decaying"}, True, "stalled"),
    ("falls on both", checks(START, (NONE, LOSS, LOSS, LOSS)), {"theta": "undecided"}, False, "stalled"),
    ("no gain, both flat", checks(START, (NONE, VAGUE, VAGUE, VAGUE)), dict.fromkeys(("theta", "phi"), "plateau"), True,
     "stalled"),
    ("no gain, theta falls", checks(START, (NONE, VAGUE, VAGUE, GAIN)), {"theta": "decaying", "phi": "plateau"}, False,
     "stalled"),
    ("no gain, three windows", checks(START, *[(NONE, VAGUE, VAGUE, GAIN)] * DOUBLINGS), {"phi": "decaying"}, True,
     "undecided"),
    ("none for sure", checks(START, *[(NONE, ZERO, ZERO, GAIN)] * DOUBLINGS), {"phi": "decaying"}, True, "converged"),
    ("small gap, no gain", checks(START, (TINY, VAGUE, VAGUE, VAGUE)), {"phi": "plateau"}, True, "converged"),
    ("small gap, worse", checks(START, (TINY, LOSS, LOSS, VAGUE)), {"phi": "decaying"}, False, "undecided"),
    ("large gap, no gain", checks(START, *[(FAR, VAGUE, VAGUE, VAGUE)] * 4), {"phi": "plateau"}, False, "stalled"),
    ("the first window", checks(START), {"phi": "plateau"}, False, "undecided"),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "trends", "over", "outcome"), [r[1:] for r in RULES], ids=[r[0] for r in RULES])
def test_the_stopping_rule(seen: tuple[Check, ...], trends: dict[str, Trend], over: bool, outcome: str) -> None:
    assert is_over(seen, trends, TOL) == over
    parts = {name: Plateau(trend, NONE, NONE, None, f"is {trend}") for name, trend in trends.items()}
    evidence = Evidence(seen, "undecided", "of all", parts=parts, best_step=500)
    verdict = decide(evidence, TOL, unavailable("no"), None)
    assert verdict.outcome == outcome
    told = " ".join(verdict.reasons)
    assert "on held-out rows" in told
    assert ("overfits" in told) == (over and outcome == "stalled" and "plateau" not in trends.values())
    if seen[-1].over_best is LOSS:
        assert "returned are the parameters of the window that ended at step 500" in told
    if outcome in ("slow", "stalled", "undecided") and "overfits" not in told:
        assert all(f"{name}: is {trend}" in told for name, trend in trends.items())


def test_without_held_out_rows_a_check_is_written_as_before(run: Any) -> None:
    """No word of them in the state on disk."""
    fit, _ = run
    tensors, meta = pack(fit.state)
    assert unpack(tensors, json.loads(json.dumps(meta))).checks == fit.state.checks
    assert {"best", "previous"} <= tensors.keys()
    plain = fit.state._replace(
        checks=tuple(check._replace(over_best=None, training=None) for check in fit.state.checks),
        monitor=fit.state.monitor._replace(judges_held_out=False),
        best=None,
    )
    tensors, meta = pack(plain)
    assert "best" not in tensors
    assert "held" not in json.dumps(meta)
    assert "best" not in json.dumps(meta)
    assert all(len(check) == 5 for check in meta["checks"])
