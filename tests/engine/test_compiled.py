"""The compiled engine: the traced engine's iterates, in one call; and what happens where compiling fails."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.engine import Calculus, Carry, Engine, Stream, make_engine, start_carry
from bbvi_conv.engine.compiled import CompiledEngine, _groups, in_turn
from bbvi_conv.engine.engine import TracedEngine
from bbvi_conv.engine.native import NativeLoop
from bbvi_conv.engine.native.cache import folder
from bbvi_conv.engine.streams import block_of
from bbvi_conv.families import MeanField, NeuralSpline
from bbvi_conv.objectives import ELBO, IWAE, Objective
from bbvi_conv.optim import SGD, Adam, Constant, CosineDecay, ExponentialDecay, InverseLinear, InverseSqrt, StepSize
from bbvi_conv.program import Minibatch, Program
from bbvi_conv.program.build import build
from bbvi_conv.program.scan import operations
from bbvi_conv.program.trace import TracedLogWeights

RULE = Adam(InverseSqrt(0.1))


def advance(
    engine: Engine, objective: Objective, *chunks: int, rule: Any = RULE, start: int = 0
) -> tuple[Carry, Tensor]:
    """Consecutive chunks of steps, every seed from the same parameters."""
    program, seeds = engine.calculus.program, engine.num_seeds
    carry = Carry.stack([start_carry(rule, program.initial())] * seeds)
    losses = []
    for count in chunks:
        stream = Stream(program, 0, "optimise", objective.draws, num_seeds=seeds)
        carry, part = engine.advance(carry, stream, start, count)
        losses.append(part)
        start += count
    return carry, torch.cat(losses)


def both(program: Program, objective: Objective, rule: Any = RULE, seeds: int = 1) -> tuple[Engine, Engine]:
    """Compiled and traced."""
    compiled = make_engine("compiled", program, objective, rule, num_seeds=seeds)
    assert compiled.name == "compiled"
    return compiled, make_engine("traced", program, objective, rule, num_seeds=seeds)


def assert_same(program: Program, objective: Objective, steps: int = 200, seeds: int = 1, rtol: float = 1e-9) -> None:
    """Same noise, same iterates, relative to how far they moved."""
    (ours, losses), (theirs, expected) = (advance(e, objective, steps) for e in both(program, objective, seeds=seeds))
    moved = (theirs.x - program.initial()).norm()
    assert moved > 0.1
    assert (ours.x - theirs.x).norm() < rtol * moved
    assert torch.equal(ours.step, theirs.step)
    torch.testing.assert_close(losses, expected, rtol=10 * rtol, atol=0)


def test_same_iterates_as_traced(small: tuple[Program, ELBO]) -> None:
    assert_same(*small)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 30))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x.float() / 255)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x.float() / 255).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.fixture(scope="module")
def images() -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, x = Autoencoder(), (torch.rand(50, 30) < 0.4).to(torch.uint8) * 255
    return build(vae.model, vae.guide, (x,), minibatch=Minibatch(8, plate="data"))


def test_rows_are_gathered_inside_the_loop_from_resident_bytes(images: Program) -> None:
    assert images.args[0].dtype == torch.uint8
    assert_same(images, IWAE(3, "doubly-reparameterised"), rtol=1e-4)


@pytest.mark.parametrize("case", ["no products", "products"])
def test_seeds_run_together(shipped, images: Program, case: str) -> None:
    """Side by side or in turn, each has the iterates of the traced steps."""
    module = shipped("eight_schools")
    schools = build(module.model, None, module.data(), family=MeanField())
    program, rtol = (schools, 1e-9) if case == "no products" else (images, 1e-3)
    compiled, traced = both(program, ELBO(), seeds=3)
    assert isinstance(compiled, CompiledEngine)
    assert compiled.in_turn == (case == "products")
    (ours, losses), (theirs, expected) = (advance(e, ELBO(), 100) for e in (compiled, traced))
    assert ours.x.shape[0] == losses.shape[1] == 3
    assert (ours.x[0] - ours.x[1]).norm() > 0.01
    assert (ours.x - theirs.x).norm() < rtol * (theirs.x - program.initial()).norm()
    torch.testing.assert_close(losses, expected, rtol=rtol, atol=0)


def test_seeds_in_turn_are_the_runs_of_one_seed_to_the_last_bit(images: Program) -> None:
    """Over block and chunk boundaries; what one seed compiled is what they run."""
    one, three = (make_engine("compiled", images, ELBO(), RULE, num_seeds=s) for s in (1, 3))
    assert isinstance(three, CompiledEngine)
    assert three.in_turn
    assert not three.prepare()  # nothing new was compiled
    start = block_of(images, 1) - 256
    ours, losses = advance(three, ELBO(), 3, 267, start=start)
    for seed, carry in enumerate(ours.unstack()):
        stream = Stream(images, seed, "optimise", 1)
        alone, expected = one.advance(start_carry(RULE, images.initial()), stream, start, 270)
        assert all(torch.equal(a, b) for a, b in zip(carry.flat(), alone.flat(), strict=True))
        assert torch.equal(losses[:, seed], expected)


def test_seeds_on_two_threads_are_the_runs_of_one_seed_on_one(images: Program, two_threads: None) -> None:
    """Three seeds on two threads, so that a block is run in parts; with products by torch, whose threads count."""
    three = make_engine("compiled", images, ELBO(), RULE, num_seeds=3)
    assert isinstance(three, CompiledEngine)
    assert three.at_once == 2
    start = block_of(images, 1) - 256
    ours, losses = advance(three, ELBO(), 1, 269, start=start)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    one = make_engine("compiled", images, ELBO(), RULE)
    for seed, carry in enumerate(ours.unstack()):
        stream = Stream(images, seed, "optimise", 1)
        alone, expected = one.advance(start_carry(RULE, images.initial()), stream, start, 270)
        assert all(torch.equal(a, b) for a, b in zip(carry.flat(), alone.flat(), strict=True))
        assert torch.equal(losses[:, seed], expected)


def test_what_a_call_is_given_counts_not_what_the_last_one_left(images: Program) -> None:
    """A carry that is still in place is not copied again; one that was changed since, or another one, is."""
    engine, _ = both(images, ELBO())
    stream = Stream(images, 0, "optimise", 1)

    def go(carry: Carry) -> Tensor:
        return engine.advance(carry, stream, 0, 5)[0].x

    start = start_carry(RULE, images.initial())
    first, _ = engine.advance(start, stream, 0, 5)
    kept = Carry.unflatten([part.clone() for part in first.flat()])
    expected = go(kept)
    engine.advance(start, stream, 0, 5)
    assert torch.equal(go(first), expected)  # another call came between
    again, _ = engine.advance(start, stream, 0, 5)
    again.x.add_(0.1)
    assert not torch.equal(go(again), expected)
    assert torch.equal(go(kept), expected)
    last, _ = engine.advance(start, stream, 0, 5)
    assert torch.equal(go(last), expected)  # in place
    last, _ = engine.advance(start, stream, 0, 5)
    assert isinstance(engine, CompiledEngine)
    engine._loop._example[0].fill_(0.5)
    assert not torch.equal(go(last), expected)  # power: nothing was copied


def regression(columns: int, hidden: int = 0) -> Program:
    """Linear regression, or a network with a hidden layer, on twenty rows of data."""

    def model(x: Tensor) -> None:
        if hidden:
            w = pyro.sample("w", dist.Normal(torch.zeros(columns, hidden), 1.0).to_event(2))
            v = pyro.sample("v", dist.Normal(torch.zeros(hidden, 2), 1.0).to_event(2))
            pyro.sample("y", dist.Normal((x @ w).tanh() @ v, 1.0).to_event(2), obs=x[:, :2])
        else:
            w = pyro.sample("w", dist.Normal(torch.zeros(columns), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=x[:, 0])

    x = torch.randn(20, columns, generator=torch.Generator().manual_seed(0))
    return build(model, None, (x,), family=MeanField(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("columns", "hidden", "seeds", "turns"),
    [(5, 0, 15, True), (5, 0, 16, False), (100, 0, 4, True), (100, 0, 8, False), (5, 3, 40, True)],
)
def test_many_seeds_share_one_product_with_data(columns: int, hidden: int, seeds: int, turns: bool) -> None:
    program = regression(columns, hidden)
    calculus = Calculus(program, ELBO(), TracedLogWeights(program), 1.0)
    assert in_turn(TracedEngine(calculus, RULE, "", num_seeds=seeds)) == turns


def test_many_seeds_have_a_thread_for_each_group(two_threads: None) -> None:
    """Two groups of seventeen, with the iterates of the traced steps, over block and chunk boundaries."""
    program, seeds = regression(5), 34
    compiled, traced = both(program, ELBO(), seeds=seeds)
    assert isinstance(compiled, CompiledEngine)
    assert not compiled.in_turn
    assert compiled.at_once == 2
    start = block_of(program, 1) - 256
    (ours, losses), (theirs, expected) = (advance(e, ELBO(), 3, 267, start=start) for e in (compiled, traced))
    moved = (theirs.x - program.initial()).norm()
    assert (ours.x[0] - ours.x[17]).norm() > 0.01
    assert (ours.x - theirs.x).norm() < 1e-4 * moved
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("seeds", "threads", "groups"), [(32, 2, 2), (31, 2, 1), (33, 2, 1), (64, 3, 2), (48, 8, 3)])
def test_groups_are_even_and_fill_vectors(seeds: int, threads: int, groups: int) -> None:
    assert _groups(seeds, threads) == groups


def gaussian_process(x: Tensor, y: Tensor) -> None:
    """A Cholesky factor of parameters: an operation of torch's own amid the kernels."""
    log_length = pyro.sample("log_length", dist.Normal(0.0, 1.0))
    kernel = torch.exp(-0.5 * ((x[:, None] - x[None]) / log_length.exp()) ** 2) + 0.1 * torch.eye(len(x), dtype=x.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), scale_tril=torch.linalg.cholesky(kernel)), obs=y)


def test_operations_of_torch_stand_between_kernels() -> None:
    x = torch.linspace(0, 5, 40, dtype=torch.float64)
    program = build(gaussian_process, None, (x, torch.sin(x)), family=MeanField(), dtype=torch.float64)
    assert_same(program, ELBO(2), steps=50)


def matrix(x: Tensor) -> None:
    """A product too large to be written out."""
    w = pyro.sample("w", dist.Normal(torch.zeros(60, 50, dtype=x.dtype), 1.0).to_event(2))
    pyro.sample("y", dist.Normal(torch.tanh(x @ w), 0.1).to_event(2), obs=x[:, :50])


def test_large_products_are_left_to_torch() -> None:
    x = torch.randn(40, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    program = build(matrix, None, (x,), family=MeanField(), dtype=torch.float64)
    assert_same(program, ELBO(), steps=30)


def test_chunk_boundaries_may_fall_anywhere(images: Program) -> None:
    engine, start = make_engine("compiled", images, ELBO(), RULE), block_of(images, 1) - 256
    whole, losses = advance(engine, ELBO(), 270, start=start)
    for chunks in ((1, 254, 2, 13), (100, 170)):
        parts, pieces = advance(engine, ELBO(), *chunks, start=start)
        assert all(torch.equal(a, b) for a, b in zip(whole.flat(), parts.flat(), strict=True))
        assert torch.equal(losses, pieces)


def steep(y: Tensor) -> None:
    """Loses its finite log-probability once the scale of the guide has moved far enough."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("wall", torch.where(z > 2.0, (2.0 - z).sqrt(), 3 * z))


def test_a_step_that_is_not_finite_freezes_the_carry_at_the_same_step() -> None:
    program = build(steep, None, (torch.tensor(0.0),), family=MeanField(), dtype=torch.float64)
    rule = SGD(Constant(0.01))
    (ours, losses), (theirs, _) = (advance(e, ELBO(), 300, rule=rule) for e in both(program, ELBO(), rule))
    assert 0 < int(theirs.bad) < 299
    assert int(ours.bad) == int(theirs.bad)
    assert not torch.isfinite(losses[int(ours.bad)])
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-9, atol=0)


def test_a_compiled_step_reads_its_gradient_once() -> None:
    """The traced one looks whether it is finite, and chooses between its new state and its old one."""
    program = build(steep, None, (torch.tensor(0.0),), family=MeanField(), dtype=torch.float64)
    engine = make_engine("traced", program, ELBO(), RULE)
    assert isinstance(engine, TracedEngine)

    def ends(graph: Any) -> tuple[int, set[Any]]:
        (end,) = graph.graph.find_nodes(op="output")
        return len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.amax.default)), {
            node.target for node in end.args[0][: engine.carried]
        }

    checks, targets = ends(engine.one.graph)
    assert (checks, targets) == (1, {torch.ops.aten.where.self})
    checks, targets = ends(engine.side_by_side(1, checked=False).graph)
    assert checks == 0
    assert torch.ops.aten.where.self not in targets


# ---- the cache ----


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], CompiledEngine]]:
    """``tiny()``: a small compiled engine, over a cache of the test's own."""
    monkeypatch.setenv("BBVI_CONV_CACHE", str(tmp_path / "cache"))

    def model() -> None:
        pyro.sample("z", dist.Normal(1.0, 2.0))

    def make() -> CompiledEngine:
        engine = make_engine("compiled", build(model, family=MeanField()), ELBO(), RULE)
        assert isinstance(engine, CompiledEngine)
        return engine

    return make


def entry(tmp_path: Path) -> Path:
    (found,) = (p for p in (tmp_path / "cache").iterdir() if not p.name.startswith("."))
    return found


def test_a_second_engine_finds_what_the_first_compiled(tiny: Callable[[], CompiledEngine], tmp_path: Path) -> None:
    first, _ = advance(tiny(), ELBO(), 20)
    before = (entry(tmp_path) / "step.so").stat().st_mtime_ns
    second = tiny()
    assert second.cached
    assert not second.prepare()
    assert torch.equal(advance(second, ELBO(), 20)[0].x, first.x)
    assert (entry(tmp_path) / "step.so").stat().st_mtime_ns == before


def by_the_data(seed: int, scale: float) -> Program:
    """With a prior by the data."""
    gen = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, 30, dtype=torch.float64, generator=gen)

    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, scale * y.std()))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 0.7), obs=y)

    return build(model, None, (x, x + noise), family=MeanField(), dtype=torch.float64)


def test_code_serves_other_data_priors_and_step_sizes() -> None:
    for seed, scale, size in [(0, 2.5, 0.01), (1, 7.0, 0.03)]:
        program, rule = by_the_data(seed, scale), Adam(Constant(size), max_norm=300 * size)
        traced = make_engine("traced", program, ELBO(), rule)
        assert isinstance(traced, TracedEngine)
        compiled = CompiledEngine(traced, "to see")
        assert compiled.cached is (seed == 1)
        compiled.prepare()
        (moved, losses), (expected, right) = (advance(engine, ELBO(), 50, rule=rule) for engine in (compiled, traced))
        torch.testing.assert_close(moved.x, expected.x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(losses, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "rule",
    [
        InverseSqrt,
        lambda size: InverseLinear(size, 100 * size),
        lambda size: ExponentialDecay(size, 5 * size, int(1000 * size)),
        lambda size: CosineDecay(size, int(1000 * size), 7 * size),
    ],
    ids=["InverseSqrt", "InverseLinear", "ExponentialDecay", "CosineDecay"],
)
def test_code_serves_other_numbers_of_a_rule(rule: Callable[[float], StepSize], program: Program) -> None:
    engines = (make_engine("traced", program, ELBO(), SGD(rule(size))) for size in (0.03, 0.04))
    one, other = (CompiledEngine(engine, "to see") for engine in engines if isinstance(engine, TracedEngine))
    assert one._loop.name == other._loop.name


@pytest.mark.parametrize("damage", ["step.so", "plan.json", "torn.json", "other.json"])
def test_a_damaged_entry_is_built_anew(tiny: Callable[[], CompiledEngine], tmp_path: Path, damage: str) -> None:
    first, _ = advance(tiny(), ELBO(), 20)
    where = entry(tmp_path)
    if damage == "step.so":
        begin = (where / damage).read_bytes()[:1000]
        (where / damage).unlink()  # the library in use stays whole
        (where / damage).write_bytes(begin)
    elif damage == "plan.json":
        (where / damage).unlink()
    elif damage == "torn.json":
        (where / "plan.json").write_text((where / "plan.json").read_text()[:40])
    else:
        (where / "plan.json").write_text(json.dumps({"inputs": []}))
    assert torch.equal(advance(tiny(), ELBO(), 20)[0].x, first.x)
    assert (where / "step.so").stat().st_size > 1000


def test_the_cache_folder_is_private_and_another_is_not_used(
    tiny: Callable[[], CompiledEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny()
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    folder = tmp_path / "cache"
    assert folder.stat().st_mode & 0o777 == 0o700
    where = entry(tmp_path)
    folder.chmod(0o755)
    with pytest.warns(UserWarning, match=r"chmod 700 .*cache"):
        engine = tiny()
    assert int(advance(engine, ELBO(), 5)[0].step) == 5
    assert entry(tmp_path) == where
    assert not list(elsewhere.glob("bbvi_conv-*"))


@pytest.mark.parametrize("rule", [RULE, SGD(Constant(0.01))], ids=["adam", "sgd"])
@pytest.mark.parametrize("number", [0, 1], ids=["loss", "gradient"])
def test_code_that_gives_another_step_is_not_used(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rule: Any, number: int
) -> None:
    monkeypatch.setenv("BBVI_CONV_CACHE", str(tmp_path / "cache"))
    right = NativeLoop.__call__

    def wrong(self: NativeLoop, *given: Any) -> tuple[list[Tensor], list[Tensor]]:
        carry, (loss,) = right(self, *given)
        return ([1.1 * part for part in carry], [loss]) if number else (carry, [1.1 * loss])

    monkeypatch.setattr(NativeLoop, "__call__", wrong)
    with pytest.raises(ValueError, match=r"cannot be compiled: compiled code does not give the step .*(loc|the loss)"):
        make_engine("compiled", program, ELBO(), rule)
    with pytest.warns(UserWarning, match="does not give the step of the traced engine"):  # nor by a later process
        assert make_engine("auto", program, ELBO(), rule).name == "traced"


@pytest.mark.parametrize("draws", [1, 10])
def test_code_that_the_compiler_refuses_is_written_once_more(draws: int) -> None:
    """Inductor forgets the index of a permuted vector that a spline is made of, unless it is to check the index."""
    program = build(several, None, (), family=NeuralSpline(num_layers=1), dtype=torch.float64)
    traced, compiled = (make_engine(name, program, ELBO(draws), RULE) for name in ("traced", "compiled"))
    (right, losses), (found, same) = (advance(engine, ELBO(draws), 5) for engine in (traced, compiled))
    torch.testing.assert_close(same, losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.x, right.x, rtol=1e-9, atol=1e-12)


def several() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("group", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.arange(8.0))


def grouped(group: Tensor, y: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(level[group], 1.0), obs=y)


def test_an_index_out_of_range_in_rows_not_seen_before_is_named() -> None:
    group = torch.arange(40) % 5
    group[37] = 9
    batch = Minibatch(4, plate="data")
    program = build(grouped, None, (group, torch.zeros(40)), family=MeanField(), minibatch=batch)
    engine = make_engine("compiled", program, ELBO(), RULE)
    with pytest.raises(IndexError, match="index 9 is out of bounds"):
        advance(engine, ELBO(), 200)


# ---- where compiling fails ----


def normal(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.fixture
def program() -> Program:
    return build(normal, None, (torch.tensor(1.0),), family=MeanField())


def test_auto_weighs_steps_against_compiling(program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BBVI_CONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("bbvi_conv.engine.choose.COMPILE_SECONDS", 5.0)
    few = make_engine("auto", program, ELBO(), RULE, steps=100)
    assert few.name == "traced"
    assert "100 steps do not repay" in few.reason
    many = make_engine("auto", program, ELBO(), RULE, steps=10**6)
    assert (many.name, many.reason) == ("compiled", "compiled for this run")
    again = make_engine("auto", program, ELBO(), RULE, steps=100)
    assert (again.name, again.reason) == ("compiled", "compiled by an earlier run")


def test_auto_weighs_what_runs_have_lost_together(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever makes the same few steps again and again waits for the compiler once, and no longer than it would."""
    monkeypatch.setattr("bbvi_conv.engine.choose.COMPILE_SECONDS", 5.0)
    monkeypatch.setattr("bbvi_conv.engine.choose.COMPILE_SECONDS_PER_NODE", 0.0)
    monkeypatch.setattr("bbvi_conv.engine.choose.STEP_SECONDS_PER_NUMBER", 0.0)
    monkeypatch.setenv("BBVI_CONV_CACHE", str(tmp_path / "cache"))
    rule = Adam(InverseSqrt(0.1))
    _, nodes = operations(make_engine("traced", program, ELBO(), rule).one.graph)  # type: ignore[union-attr]
    monkeypatch.setattr("bbvi_conv.engine.choose.STEP_SECONDS_PER_NODE", 0.012 / nodes)
    seen = [make_engine("auto", program, ELBO(), rule, steps=100).name for _ in range(6)]
    assert seen == ["traced"] * 4 + ["compiled"] * 2
    assert not list(folder().glob("*.lost"))


@pytest.mark.parametrize(("size", "chosen"), [(10, "traced"), (50_000, "compiled")])
def test_auto_weighs_the_numbers_of_a_step(size: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many operations, but more to gain where each computes more numbers."""

    def wide(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    monkeypatch.setattr("bbvi_conv.engine.choose.COMPILE_SECONDS", 0.0)
    monkeypatch.setattr("bbvi_conv.engine.choose.COMPILE_SECONDS_PER_NODE", 1000 * 8e-6)
    monkeypatch.setattr(CompiledEngine, "prepare", lambda self: True)
    program = build(wide, None, (torch.ones(size),), family=MeanField())
    assert make_engine("auto", program, ELBO(), RULE, steps=1000).name == chosen


def test_without_a_compiler_a_fit_runs_traced_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bbvi_conv.engine.choose.COMPILE_SECONDS", 0.0)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit = bc.fit(normal, args=(torch.tensor(1.0),), max_steps=1000, progress=False)
    assert [str(w.message) for w in seen if "no C++ compiler" in str(w.message)] == [
        "steps run uncompiled: there is no C++ compiler (g++ or clang++ on PATH, or CXX)"
    ]
    assert fit.engine_name == "traced"
    assert "no C++ compiler" in fit.engine_reason
    with pytest.raises(ValueError, match=r"no C\+\+ compiler.*use engine=\"traced\""):
        bc.fit(normal, args=(torch.tensor(1.0),), engine="compiled", progress=False)


@torch.library.custom_op("bbvi_conv_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """An operation of which nothing is known but what it does."""
    return x.clone()


opaque.register_vmap(lambda info, in_dims, x: (opaque(x), in_dims[0]))


def with_opaque(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z + opaque(z.detach()), 1.0), obs=y)


def test_what_cannot_be_compiled_still_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bbvi_conv.engine.choose.COMPILE_SECONDS", -100.0)
    with pytest.warns(UserWarning, match="opaque") as seen:
        fit = bc.fit(with_opaque, args=(torch.tensor(1.0),), max_steps=1000, progress=False)
    assert len([w for w in seen if "uncompiled" in str(w.message)]) == 1
    assert fit.engine_name == "traced"
    assert fit.state.step > 0


def test_a_failing_compiler_is_named(
    tiny: Callable[[], CompiledEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'error: no space' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(ValueError, match=r"broken-compiler failed on the generated code: error: no space"):
        tiny()
    assert not [p for p in os.listdir(tmp_path / "cache") if not p.startswith(".")]
