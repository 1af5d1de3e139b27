"""One optimiser step as a pure function of tensors, and two engines that run many of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from bbvi_conv.engine.calculus import Calculus
from bbvi_conv.engine.streams import Stream
from bbvi_conv.optim import Average, Optimiser, empty_average, include
from bbvi_conv.program.aten_graph import Untraceable
from bbvi_conv.program.graph_module import WrittenLate
from bbvi_conv.program.graphs import has_products, round_products, simplify
from bbvi_conv.program.minibatch import Batch
from bbvi_conv.program.noise import Noise
from bbvi_conv.program.trace import over_draws, simplified


class Carry(NamedTuple):
    """State between steps: iterate ``x`` ``(P,)``, optimiser ``state``, window ``average``, ``step``, first ``bad``.

    ``bad`` is -1 while everything is finite; from the first non-finite loss or gradient on, the carry is frozen.
    With S seeds at once every tensor has S in front, and a seed is frozen by itself.
    """

    x: Tensor
    state: tuple[Tensor, ...]
    average: Average
    step: Tensor
    bad: Tensor

    def flat(self) -> list[Tensor]:
        """Tensors in a fixed order."""
        return [self.x, *self.state, *self.average, self.step, self.bad]

    @staticmethod
    def unflatten(flat: list[Tensor]) -> Carry:
        """The inverse of :meth:`flat`."""
        x, *state, mean, count, step, bad = flat
        return Carry(x, tuple(state), Average(mean, count), step, bad)

    @staticmethod
    def stack(carries: Sequence[Carry]) -> Carry:
        """The carries of S seeds side by side; of a single one, itself."""
        return carries[0] if len(carries) == 1 else Carry._together(torch.stack, carries)

    @staticmethod
    def cat(carries: Sequence[Carry]) -> Carry:
        """The carries of groups of seeds as that of all seeds."""
        return Carry._together(torch.cat, carries)

    @staticmethod
    def _together(how: Callable[[tuple[Tensor, ...]], Tensor], carries: Sequence[Carry]) -> Carry:
        return Carry.unflatten([how(parts) for parts in zip(*(c.flat() for c in carries), strict=True)])

    def of_seeds(self, seed: int | slice) -> Carry:
        """That of one of S seeds, or of several."""
        return Carry.unflatten([part[seed] for part in self.flat()])

    def unstack(self) -> list[Carry]:
        """The inverse of :meth:`stack`."""
        if self.step.dim() == 0:
            return [self]
        return [self.of_seeds(seed) for seed in range(len(self.step))]


def start_carry(optimiser: Optimiser, x: Tensor) -> Carry:
    """The carry before the first step."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return Carry(x, optimiser.init(x), empty_average(x), zero, zero - 1)


class Engine(Protocol):
    """Runs steps; ``name`` and ``reason`` say which engine and why.

    An engine of ``num_seeds`` S > 1 takes and gives carries of S seeds, and a stream of as many.
    """

    name: str
    reason: str
    calculus: Calculus
    num_seeds: int

    def advance(self, carry: Carry, stream: Stream, start: int, count: int) -> tuple[Carry, Tensor]:
        """Run the steps ``start .. start + count - 1``; returns the carry and the losses ``(count,)``, or with S seeds
        ``(count, S)``.
        """
        ...


def step(calculus: Calculus, optimiser: Optimiser, carry: Carry, noise: Noise, batch: Batch) -> tuple[Carry, Tensor]:
    """One step; a non-finite loss or gradient leaves the carry as it was but for ``bad``."""
    n = carry.step + 1
    grad, loss = calculus._gradient(carry.x, noise, batch, n)
    with torch.no_grad():
        x, state = optimiser.update(grad, carry.state, carry.x, n)
        moved = Carry(x, state, include(carry.average, x), n, carry.bad)
        fine = torch.isfinite(loss) & torch.isfinite(grad.abs().amax()) & (carry.bad < 0)
        kept = [torch.where(fine, new, old) for new, old in zip(moved.flat(), carry.flat(), strict=True)]
        kept[-1] = torch.where(fine | (carry.bad >= 0), carry.bad, carry.step)
        return Carry.unflatten(kept), loss


class EagerEngine:
    """Runs Pyro's handlers at every step: any program, value-dependent control flow included."""

    name = "eager"

    def __init__(self, calculus: Calculus, optimiser: Optimiser, reason: str, *, num_seeds: int = 1) -> None:
        self.calculus, self.optimiser, self.reason, self.num_seeds = calculus, optimiser, reason, num_seeds
        changing = calculus.program.changing
        if num_seeds > 1 and changing:
            raise ValueError(
                f"{changing[0]}, and {num_seeds} seeds at once would share it: put its module in eval mode, or fit the "
                "seeds one by one"
            )

    def advance(self, carry: Carry, stream: Stream, start: int, count: int) -> tuple[Carry, Tensor]:
        """Run steps one after the other, and seed by seed."""

        def one(carry: Carry, noise: Noise, batch: Batch) -> tuple[Carry, Tensor]:
            return step(self.calculus, self.optimiser, carry, noise, batch)

        def all_seeds(carry: Carry, noise: Noise, batch: Batch) -> tuple[Carry, Tensor]:
            carries, losses = [], []
            for s, own in enumerate(carry.unstack()):
                rows = None if batch.indices is None else batch.indices[s]
                moved, loss = one(own, noise.at(s), Batch(tuple(a[s] for a in batch.args), rows))
                carries.append(moved)
                losses.append(loss)
            return Carry.stack(carries), torch.stack(losses)

        return _loop(one if self.num_seeds == 1 else all_seeds, self.calculus, carry, stream, start, count)


class StepGraph(NamedTuple):
    """Flat tensors to flat tensors: carry, noise, batch to carry, loss.

    Attributes:
        graph: plain operations.
        example: its inputs.
        vectorised: with several seeds, whether ``vmap`` mapped it; otherwise it holds a copy for each.
    """

    graph: GraphModule
    example: list[Tensor]
    vectorised: bool = True

    def step(self, carry: Carry, noise: Noise, batch: Batch) -> tuple[Carry, Tensor]:
        """The carry after a step, and its loss."""
        rows = [] if batch.indices is None else [batch.indices]
        *flat, loss = self.graph(*carry.flat(), *noise, *batch.args, *rows)
        return Carry.unflatten(flat), loss


class TracedEngine:
    """Runs one graph of plain operations per step: gradient, optimiser and average included, and all seeds at once.

    ``amp`` rounds in matrix products and convolutions of a step: ``"bfloat16"`` the numbers that they take and give,
    ``"tf32"``, on CUDA, those that they take, to 11 bits or more. Looks and checks, which the calculus makes, do not
    round.

    Attributes:
        amp: how products of a step round.
        one: a step of one seed.
        carried: how many of its inputs are the carry.
    """

    name = "traced"

    def __init__(
        self,
        calculus: Calculus,
        optimiser: Optimiser,
        reason: str,
        *,
        num_seeds: int = 1,
        amp: str | None = None,
    ) -> None:
        self.calculus, self.optimiser, self.reason, self.num_seeds = calculus, optimiser, reason, num_seeds
        program = calculus.program
        if amp == "tf32" and program.device.type != "cuda":
            raise ValueError(f'amp="tf32" needs a CUDA device, and this run is on {program.device}: leave it out')
        self.amp = amp
        start = start_carry(optimiser, program.initial())
        noise, batch = program.example()
        draws = Noise(*(part.expand(calculus.objective.draws, -1).clone() for part in noise))
        self.carried, self._parts = len(start.flat()), len(batch.args)
        rows = [] if batch.indices is None else [batch.indices]
        example = [*start.flat(), *draws, *batch.args, *rows]
        graph = simplified(self._flat, *example)
        if amp is not None and not (has_products(graph) if self.tf32 else round_products(graph, torch.bfloat16)):
            raise ValueError("a step has no matrix product or convolution of float32 numbers: leave amp out")
        self.one = StepGraph(graph if amp is None else simplify(graph), example)
        self._graphs: dict[tuple[int, bool], StepGraph] = {}

    @property
    def tf32(self) -> bool:
        """Whether products on CUDA may round what they take."""
        return self.amp == "tf32"

    @property
    def all(self) -> StepGraph:
        """A step of all S seeds, S in front of every tensor; of a single one, :attr:`one`."""
        return self.side_by_side(self.num_seeds)

    def side_by_side(self, count: int, *, checked: bool = True) -> StepGraph:
        """A step of so many seeds; unless ``checked`` it goes on where a loss or gradient is not finite."""
        key = count, checked
        if key not in self._graphs:
            one = self.one if checked else _unchecked(self.one, self.carried)
            self._graphs[key] = one if count == 1 else _of_seeds(one, count)
        return self._graphs[key]

    def _flat(self, *flat: Tensor) -> tuple[Tensor, ...]:
        carry, rest = Carry.unflatten(list(flat[: self.carried])), flat[self.carried :]
        args, rows = rest[2 : 2 + self._parts], rest[2 + self._parts :]
        batch = Batch(tuple(args), rows[0] if rows else None)
        carry, loss = step(self.calculus, self.optimiser, carry, Noise(rest[0], rest[1]), batch)
        return (*carry.flat(), loss)

    def advance(self, carry: Carry, stream: Stream, start: int, count: int) -> tuple[Carry, Tensor]:
        """Run the graph once per step."""

        with torch.no_grad(), float32_products(self.tf32):
            return _loop(self.all.step, self.calculus, carry, stream, start, count)

    def finite_or_again(
        self, moved: tuple[Carry, Tensor], carry: Carry, stream: Stream, start: int, count: int
    ) -> tuple[Carry, Tensor]:
        """What unchecked steps from ``carry`` came to; where their end is not finite, the steps once more, checked.

        NaN and infinity stay, so that the end tells. A seed that was frozen before stays as it was.
        """
        end, losses = moved
        frozen = carry.bad >= 0
        finite = torch.isfinite(end.x).all(-1) & torch.isfinite(losses).all(0)
        if not bool((finite | frozen).all()):
            return self.advance(carry, stream, start, count)
        if bool(frozen.any()):
            triples = zip(frozen.reshape(-1).tolist(), carry.unstack(), end.unstack(), strict=True)
            end = Carry.stack([old if stays else new for stays, old, new in triples])
        return end, losses


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Products of float32 numbers on CUDA: exact, or by ``tf32``; what torch is set to is put back."""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        yield
        return
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def _unchecked(one: StepGraph, carried: int) -> StepGraph:
    """A step that keeps what is new without a condition; ``bad`` stays."""
    graph = WrittenLate(one.graph, copy.deepcopy(one.graph.graph))
    (end,) = graph.graph.find_nodes(op="output")
    *moved, bad = end.args[0][:carried]
    if any(node.target is not torch.ops.aten.where.self for node in (*moved, bad)):
        raise RuntimeError("a step does not end in the choice between its new state and its old one")
    end.args = ([*(node.args[1] for node in moved), bad.args[1], *end.args[0][carried:]],)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return StepGraph(graph, one.example)


def _of_seeds(one: StepGraph, count: int) -> StepGraph:
    """A step of so many seeds: by ``vmap``, or where that fails as copies of the one."""
    example = [torch.stack([part] * count) for part in one.example]
    mapped = [True] * len(example)
    try:
        graph, vectorised = simplified(over_draws(one.graph, mapped, vectorise=True), *example), True
    except Untraceable:
        graph, vectorised = simplified(over_draws(one.graph, mapped, vectorise=False), *example), False
    return StepGraph(graph, example, vectorised)


def _loop(
    one: Callable[[Carry, Noise, Batch], tuple[Carry, Tensor]],
    calculus: Calculus,
    carry: Carry,
    stream: Stream,
    start: int,
    count: int,
) -> tuple[Carry, Tensor]:
    losses = []
    for feed in stream.steps(start, count):
        for t in range(len(feed.noise.normal)):
            carry, loss = one(carry, feed.noise.at(t), feed.batch(calculus.program, t))
            losses.append(loss)
    return carry, torch.stack(losses) if losses else carry.x.new_zeros(0, *carry.step.shape)
