"""Build a ``Program``: one validated eager pass finds sites, leaves, units and noise, and refuses what is wrong."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from bbvi_conv.program.buffers import CalledModule, called_modules, changed_buffers, restore_buffers
from bbvi_conv.program.device import OnDevice, home, with_index
from bbvi_conv.program.enumeration import (
    Enumerated,
    check_enumerated,
    enumerated,
    is_enumerable,
    joined,
    without_discrete,
)
from bbvi_conv.program.faithful import check, check_gaps, with_gaps
from bbvi_conv.program.minibatch import Batch, Minibatch
from bbvi_conv.program.noise import NoiseLayout, random_state
from bbvi_conv.program.program import UNTAPED_SEED, Program, Rows, guide_trace, quiet_pyro
from bbvi_conv.program.structure import (
    Group,
    Leaf,
    analyse,
    as_leaf,
    check_guide,
    check_site,
    check_support,
    discrete_latent,
    innermost,
    is_deterministic,
    is_plate,
    latent_sites,
    missing_latent,
    no_transform,
    not_finite,
    plates_of,
    random_sites,
    revalued,
    strata_of,
)
from bbvi_conv.program.surroundings import changed, numbers
from bbvi_conv.program.tape import Tape, TapeEnds, taped

SMALL = 1000
"""Latent dimensions below which float64 is the default on the CPU."""

AT_ONCE = 2**22
"""Numbers of the data whose support is checked at once."""


@dataclass
class _Pass:
    """What one eager pass leaves behind.

    ``used``: trainable tensors of modules, by identity, that the guide uses, and those that the model uses.
    """

    guide: Callable[..., Any]
    enumerated: Enumerated | None
    guide_trace: Trace
    model_trace: Trace
    tape: Tape
    guide_used: NoiseLayout
    store: dict[str, Any]
    modules: list[CalledModule]
    used: tuple[Collection[int], Collection[int]]


def build(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    family: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    minibatch: Minibatch | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    loop: bool = False,
) -> Program:
    """Make the program of a model and a guide (or of the guide that ``family`` makes).

    Args:
        model: a Pyro model, called as ``model(*args, **kwargs)``.
        guide: a Pyro guide with the same arguments; None: ``family(model)``.
        args: positional arguments; with a minibatch, tensors whose leading dimension is N are gathered.
        kwargs: keyword arguments, never gathered.
        family: makes a guide from the model.
        minibatch: which rows a step sees.
        dtype: float type; None: float64 for global latents under 1,000 dimensions on the CPU, else float32, and the
            other one where the model's own tensors and networks are of it.
        device: where parameters, noise and data live; modules that are called are moved there. None: where the first
            tensor of ``args`` and ``kwargs`` that is not on the CPU lies, or else torch's default device.
        seed: for the random start of lazy parameters; torch's own generator is left as found.
        loop: for a training loop of the user's own: parameters are those in Pyro's store as it stands, every tensor
            argument may change from run to run, and the model may subsample by itself.

    Raises:
        ValueError: one sentence that names the site, argument or plate and the way out.
    """
    if (guide is None) == (family is None):
        raise ValueError("give either a guide or a family, not both" if guide else "a guide or a family is needed")
    kwargs = dict(kwargs or {})
    told = not_finite(
        [
            *((f"positional argument {i}", a) for i, a in enumerate(args)),
            *((f"keyword argument {name!r}", a) for name, a in kwargs.items()),
        ]
    )
    if isinstance(guide, type):
        name = guide.__name__
        raise ValueError(f"guide is the class {name}: make one, guide={name}(model), or give family={name}")
    _check_call("model", model, args, kwargs)
    if guide is not None:
        _check_call("guide", guide, args, kwargs)
    device = with_index(home(args, kwargs) if device is None else device)

    def of(dtype: torch.dtype) -> Program:
        try:
            return _build(model, guide, args, kwargs, family, minibatch, dtype, device, seed, loop)
        except ZeroDivisionError as error:
            if "size" not in str(error):
                raise
            raise ValueError(
                "a plate of the model is empty: the data have no rows, as after a selection that none fits"
            ) from error

    with with_gaps(told):
        program = _of_a_type(of, dtype, small=device.type == "cpu" and minibatch is None, made=guide is not None)
        check_gaps(program, told)
    return program


def _of_a_type(of: Callable[[torch.dtype], Program], dtype: torch.dtype | None, *, small: bool, made: bool) -> Program:
    """The program in the given float type, or in the first that fits: float64 first where it may be ``small``."""
    attempts = [dtype] if dtype is not None else [torch.float64, torch.float32][:: 1 if small else -1]
    failed: list[ValueError | RuntimeError] = []
    for attempt in attempts:
        try:
            program = of(attempt)
        except (ValueError, RuntimeError) as error:
            failed.append(error)
            if _is_about_types(error):
                continue
            break
        if dtype is None and small and attempt is torch.float64 and not _is_small(program):
            try:
                return of(torch.float32)
            except (ValueError, RuntimeError) as error:
                if not _is_about_types(error):
                    raise
        return program
    own = failed[-1 if small else 0]  # of float32 where both were tried: tensors are of it where nothing else is said
    explained = _explained(own, attempts[failed.index(own)], made=made)
    if explained is own:
        raise own
    raise explained from own


def _is_about_types(error: Exception) -> bool:
    """Whether torch says that numbers of two types met: a tensor of the script's, float32, and a float64 of ours."""
    return bool(re.search(r"dtype|\b(float|double)\b|expected scalar type", str(error), re.IGNORECASE))


def _explained(error: ValueError | RuntimeError, dtype: torch.dtype, *, made: bool) -> Exception:
    """What to raise for an error in the model or guide, which a user may have ``made``."""
    if isinstance(error, TapeEnds):
        return ValueError(str(error))
    if isinstance(error, RuntimeError) and _is_about_types(error):
        name = str(dtype).removeprefix("torch.")
        return ValueError(
            f"the model does not run in {name} ({str(error).splitlines()[0]}): tensors and networks made outside of it "
            "keep their own dtype; cast them, make them inside the model, or choose another dtype"
        )
    if isinstance(error, RuntimeError):
        return error
    if site := re.search(r"discrete sample site '([^']*)'", str(error)):  # said by an AutoGuide
        return ValueError(discrete_latent(site.group(1), made=made))
    error.args = (re.split(r"\n *Trace Shapes:", str(error))[0],)  # which Pyro adds to what a model raises
    return error


def _check_call(what: str, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that do not fit a signature, where there is one to read."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        signature = signature.replace(return_annotation=inspect.Signature.empty)
        given = [f"{len(args)} positional", *(f"{name}=" for name in kwargs)]
        raise ValueError(
            f"the {what} takes {signature}, and is given {', '.join(given)}: {error}; mend args and kwargs (in a model "
            "file what data() returns)"
        ) from error


def positional(args: tuple[Any, ...] | Tensor) -> tuple[Any, ...]:
    """Positional arguments as users give them: a tensor alone is the only one."""
    return (args,) if isinstance(args, Tensor) else tuple(args)


def _is_small(program: Program) -> bool:
    return sum(site.size for site in program.structure.latents) < SMALL


def _cast(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device=device, dtype=dtype) if value.is_floating_point() else value.to(device=device)


def _build(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    family: Callable[[Callable[..., Any]], Callable[..., Any]] | None,
    minibatch: Minibatch | None,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    loop: bool,
) -> Program:
    args = tuple(_cast(a, dtype, device) for a in args)
    kwargs = {k: _cast(v, dtype, device) for k, v in kwargs.items()}

    def attempt(args: tuple[Any, ...], rows: Tensor | None = None, of_size: _OfSize | None = None) -> _Pass:
        if of_size is not None:
            _check_size(of_size, model, args, kwargs, dtype, device, seed)
        with random_state(device, seed), quiet_pyro(None, dtype, device):
            made = guide if guide is not None else family(without_discrete(model))  # type: ignore[misc]
        store = pyro.get_param_store().get_state() if loop else {"params": {}, "constraints": {}}
        return _eager_pass(model, made, args, kwargs, minibatch, rows, of_size, dtype, device, seed, store)

    fed = _fed(attempt, args, minibatch, loop, device)
    own_rows = _own_rows((fed.eager.guide_trace, fed.eager.model_trace), minibatch)
    if own_rows and not loop:
        plate, fn = next(iter(own_rows.items()))
        if minibatch is not None:
            raise ValueError(
                f"plate {plate!r} subsamples {fn.subsample_size} of {fn.size} rows beside plate {minibatch.plate!r}: "
                f"only one plate can be subsampled; let {plate!r} take all its rows"
            )
        raise ValueError(
            f"plate {plate!r} subsamples {fn.subsample_size} of {fn.size} rows; "
            f'pass minibatch=Minibatch({fn.subsample_size}, plate="{plate}")'
        )
    _warn_of_constants(fed.eager)
    program = _program(model, args, kwargs, fed, minibatch, dtype, device, own_rows)
    before = numbers(model, fed.eager.guide, *program.modules)
    draws = check(program)
    moving = changed(before, numbers(model, fed.eager.guide, *program.modules))
    if draws and not program.untaped:
        fed.eager.tape.untaped.add("a random function of torch's that holds others, or of NumPy's or Python's")
        program = _program(model, args, kwargs, fed, minibatch, dtype, device, own_rows)
        check(program)
    program.obstacles += tuple(f"the number {name!r} changes as the program runs" for name in moving)
    restore_buffers(fed.eager.modules)
    return program


class _Fed(NamedTuple):
    """How data reach the model, and the pass that told.

    Attributes:
        eager: the pass.
        batch: what one run is given.
        batched: positions of the arguments that a batch replaces.
        total: N, rows of the data, where a plate is subsampled.
        by_index: whether the model takes row indices.
    """

    eager: _Pass
    batch: Batch
    batched: tuple[int, ...] = ()
    total: int = 1
    by_index: bool = False


def _fed(
    attempt: Callable[..., _Pass], args: tuple[Any, ...], minibatch: Minibatch | None, loop: bool, device: torch.device
) -> _Fed:
    if minibatch is None:
        batched = tuple(i for i, a in enumerate(args) if isinstance(a, Tensor)) if loop else ()
        return _Fed(attempt(args), Batch(tuple(args[i] for i in batched)), batched)
    total, rows = _rows(args, minibatch), torch.arange(minibatch.size, device=device)
    eager, by_index = _with_minibatch(attempt, args, minibatch, total, rows)
    _check_local_latents(eager, minibatch, by_index)
    _check_rows_lie_in_plate(attempt, eager, args, minibatch, total, rows if by_index else None)
    _check_supports(eager, args, minibatch, total)
    if by_index:
        return _Fed(eager, Batch(indices=rows), (), total, True)
    batched = tuple(i for i, a in enumerate(args) if _is_row_tensor(a, total))
    return _Fed(eager, Batch(tuple(args[i][rows] for i in batched)), batched, total)


def _program(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fed: _Fed,
    minibatch: Minibatch | None,
    dtype: torch.dtype,
    device: torch.device,
    own_rows: Iterable[str],
) -> Program:
    """The program that a pass tells of."""
    eager, used = fed.eager, fed.eager.tape.used
    seeding = UNTAPED_SEED * bool(eager.tape.untaped)
    program = Program(
        model,
        eager.guide,
        args,
        kwargs,
        store=eager.store,
        leaves=_leaves(eager),
        enumerated=eager.enumerated,
        structure=analyse(eager.guide_trace, eager.model_trace, set()),
        layout=NoiseLayout(used.normal, used.uniform + seeding),
        minibatch=minibatch,
        batched=fed.batched,
        total=fed.total,
        by_index=fed.by_index,
        dtype=dtype,
        device=device,
        obstacles=_obstacles(eager),
        untaped=bool(eager.tape.untaped),
        implicit=eager.tape.implicit or _implicit(eager.guide_trace),
        modules=[called.module for called in eager.modules],
        own_rows=list(own_rows),
        component_slots=slice(seeding, seeding + eager.guide_used.uniform),
    )
    if not program.leaves and not program.structure.latents:
        raise ValueError(
            "the model has no latent site, and neither it nor the guide a parameter: nothing is to be fitted"
        )
    program.structure = analyse(eager.guide_trace, eager.model_trace, _dependent(program, eager, fed.batch))
    _check_strata(program, eager)
    return program


def _obstacles(eager: _Pass) -> list[str]:
    """Why the program cannot be traced."""
    return [
        *(f"random operation {name!r} is not on the noise tape" for name in sorted(eager.tape.untaped)),
        *(f"buffer {name!r} changes as the program runs" for name in changed_buffers(eager.modules)),
        *_custom_functions(eager),
    ]


class _CheckSites(Messenger):  # type: ignore[misc]
    """Name a latent that nobody draws and a value that does not fit its site, before Pyro goes on."""

    def __init__(self, drawn: set[str]) -> None:
        super().__init__()
        self.drawn = drawn

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate(msg) or is_deterministic(msg):
            return
        if msg["is_observed"] or msg["name"] in self.drawn:
            check_site(msg)
        elif not is_enumerable(msg):
            raise ValueError(missing_latent(msg))


def _eager_pass(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    minibatch: Minibatch | None,
    rows: Tensor | None,
    of_size: _OfSize | None,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    store: dict[str, Any],
) -> _Pass:
    """Run guide and model once under Pyro's validation; a run before it builds lazy guides and moves modules."""
    with ExitStack() as stack:
        stack.enter_context(random_state(device, seed))
        stack.enter_context(quiet_pyro(store, dtype, device, validate=True))
        stack.enter_context(of_size or nullcontext())  # Pyro's stack of handlers is one for all threads
        modules = stack.enter_context(called_modules(device))
        stack.enter_context(OnDevice(device))
        if minibatch:
            stack.enter_context(Rows({minibatch.plate: rows}))
        if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
            try:
                guide(*args, **kwargs)
            except NotImplementedError as error:
                raise ValueError(
                    _no_transform(model, args, kwargs)
                    or f"{guide._pyro_name} cannot be made for this model: {error}; "
                    "use a vectorized plate or range(), or write a guide"
                ) from error

        def run_model(drawn: Trace, model: Callable[..., Any] = model) -> Trace:
            checked = not isinstance(model, Enumerated)
            with _CheckSites({s["name"] for s in random_sites(drawn)}) if checked else nullcontext():
                return poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)

        drawn = guide_trace(guide, args, kwargs)
        plain = run_model(drawn)  # parameters that start at random are made here, off the tape
        summed = enumerated(model, plain, {s["name"] for s in random_sites(drawn)})
        tape = stack.enter_context(taped(Tape(None, {})))
        drawn = guide_trace(guide, args, kwargs)
        guide_used, in_guide = tape.used, tape.strangers
        tape.strangers = {}
        try:
            model_trace = run_model(drawn, summed or model)
            model_trace.compute_log_prob()
        except (IndexError, RuntimeError, ValueError) as error:
            if summed is None:
                raise
            raise summed.refused(error) from error
        check_guide(drawn, model_trace)
        in_model, tape.strangers = tape.strangers, in_guide
        drawn.compute_log_prob()
        in_guide = dict(tape.strangers)
        # noise and rows of the model's own would be others every time
        if summed is not None and tape.used == guide_used and not _own_rows([model_trace], minibatch):
            check_enumerated(model_trace, plain, lambda z: run_model(drawn, poutine.condition(model, data=z)))
    tape.strangers = in_guide | in_model
    return _Pass(guide, summed, drawn, model_trace, tape, guide_used, store, modules, (set(in_guide), set(in_model)))


def _no_transform(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Which latent a family cannot have, in words; empty where that is not what is wrong with the model."""
    with suppress(Exception):
        return no_transform(poutine.trace(model).get_trace(*args, **kwargs))
    return ""


def _check_size(
    of_size: _OfSize,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> None:
    """Run the model for its plates alone: a guide made from it runs it where no handler of ours sees them.

    Raises:
        _OtherSize: whatever else is wrong the pass over guide and model says.
    """
    with (
        random_state(device, seed),
        quiet_pyro(None, dtype, device),
        called_modules(device) as modules,
        OnDevice(device),
        torch.no_grad(),
    ):
        try:
            with of_size:
                model(*args, **kwargs)
        except _OtherSize:
            raise
        except Exception:
            return
        finally:
            restore_buffers(modules)


class _OtherSize(Exception):
    """A plate does not have the size, or does not take the rows, that a batch calls for."""


class _OfSize(Messenger):  # type: ignore[misc]
    """Refuse a plate of another size before the program looks rows up that are not there, which no GPU forgives."""

    def __init__(self, plate: str, size: int, batch: int) -> None:
        super().__init__()
        self.plate, self.size, self.batch = plate, size, batch

    def _pyro_sample(self, msg: Any) -> None:
        if not is_plate(msg) or msg["name"] != self.plate:
            return
        size, rows = msg["fn"].size, msg["value"]
        taken = (msg["fn"].subsample_size or size) if rows is None else len(rows)
        if size != self.size:
            raise _OtherSize(f"plate {self.plate!r} has size {size} where the batch has {self.batch}")
        if taken != self.batch:
            raise _OtherSize(f"plate {self.plate!r} takes {taken} of {size} rows where the batch has {self.batch}")


def _is_row_tensor(value: Any, total: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == total


def _rows(args: tuple[Any, ...], minibatch: Minibatch) -> int:
    """N, the leading dimension of the first tensor argument."""
    lengths = [len(a) for a in args if isinstance(a, Tensor) and a.dim() > 0]
    if not lengths:
        raise ValueError("a minibatch needs a tensor among the positional arguments, whose leading dimension is N")
    if minibatch.size > lengths[0]:
        raise ValueError(
            f"minibatch size {minibatch.size} exceeds the {lengths[0]} rows of the data (the first positional argument "
            "that is a tensor); choose a smaller one, or put the data first"
        )
    return lengths[0]


def _with_minibatch(
    attempt: Callable[..., _Pass], args: tuple[Any, ...], minibatch: Minibatch, total: int, rows: Tensor
) -> tuple[_Pass, bool]:
    """Find out how the model subsamples: by gathered rows (False) or by indices (True).

    A plate has the size of what is gathered, or it is one of N that takes B: indices, or rows that were gathered.
    """
    size, plate = minibatch.size, minibatch.plate
    gathered = tuple(a[rows] if _is_row_tensor(a, total) else a for a in args)
    seen, failure = "", None
    for given, indices, whole in ((gathered, None, size), (args, rows, total), (gathered, None, total)):
        try:
            eager = attempt(given, indices, _OfSize(plate, whole, size))
            _check_plate(eager, plate)
            return eager, indices is not None
        except _OtherSize as error:
            seen = seen or str(error)
        except (IndexError, RuntimeError, ValueError) as error:
            failure = failure or error
    raise failure or ValueError(
        f'{seen}; write plate("{plate}", len(x)) over the gathered rows, '
        f'or plate("{plate}", {total}, subsample_size={size}) and index the data yourself'
    )


def _check_plate(eager: _Pass, name: str) -> None:
    traces = (eager.guide_trace, eager.model_trace)
    plates = {n for trace in traces for n, s in trace.nodes.items() if is_plate(s)}
    if name in plates:
        return
    if any(f.name == name for trace in traces for s in random_sites(trace) for f in s["cond_indep_stack"]):
        raise ValueError(f'plate {name!r} has no size: write pyro.plate("{name}", len(x)) over the gathered rows')
    raise ValueError(f"the model has no plate {name!r} to subsample; its plates are {sorted(plates) or 'none'}")


def _check_supports(eager: _Pass, args: tuple[Any, ...], minibatch: Minibatch, total: int) -> None:
    """Refuse data outside their support in rows that the pass has not seen, where a site observes an argument."""
    whole = [a for a in args if _is_row_tensor(a, total)]
    for site in random_sites(eager.model_trace):
        value = site["value"]
        for data in whole if site["is_observed"] and site.get("mask") is None else ():
            rows = data[: minibatch.size]
            if rows.shape == value.shape and torch.equal(rows.to(value), value):
                with suppress(RuntimeError):  # a support with a bound of its own for every row
                    for part in data.split(max(1, AT_ONCE // max(1, data[0].numel()))):
                        check_support({**site, "value": part.to(value)})


def _check_rows_lie_in_plate(
    attempt: Callable[..., _Pass],
    eager: _Pass,
    args: tuple[Any, ...],
    minibatch: Minibatch,
    total: int,
    indices: Tensor | None,
) -> None:
    """Refuse a site that holds the rows of a batch outside the plate: its density would not be scaled by N/B.

    Such a site has another shape where a batch has other rows, or other data where a model looks rows up itself.
    """
    size, traces = minibatch.size, (eager.guide_trace, eager.model_trace)
    if total == 1:
        return

    def outside(found: _Pass) -> dict[tuple[str, str], Any]:
        """Of the sites outside the plate that nobody scales what tells: shapes of value and density, or the data."""

        def telling(site: Any) -> Any:
            if indices is None:
                return site["value"].shape, site["log_prob"].shape
            return site["value"].detach().cpu().numpy().tobytes() if site["is_observed"] else None

        return {
            (where, site["name"]): telling(site)
            for where, trace in (("guide", found.guide_trace), ("model", found.model_trace))
            for site in random_sites(trace)
            if site["scale"] == 1.0 and all(frame.name != minibatch.plate for frame in site["cond_indep_stack"])
        }

    here = outside(eager)
    if indices is None and not any(size in shape for both in here.values() for shape in both):
        return
    other = size if indices is not None else size - 1 if size > 1 else 2
    given = args if indices is not None else tuple(a[:other] if _is_row_tensor(a, total) else a for a in args)
    sizes = {trace.nodes[minibatch.plate]["fn"].size for trace in traces if minibatch.plate in trace.nodes}
    try:
        rows = None if indices is None else indices + total - size
        found = attempt(given, rows, _OfSize(minibatch.plate, other if sizes == {size} else total, other))
    except Exception:  # a model written for batches of one size
        return
    there = outside(found)
    for (where, name), kinds in here.items():
        if there.get((where, name), kinds) != kinds:
            raise ValueError(
                f"site {name!r} of the {where} holds the {size} rows of a batch and lies outside plate "
                f"{minibatch.plate!r}, so that it would not be scaled to all {total:,} rows: write it inside "
                f'"with pyro.plate(...)" of that name, a dimension for the rows on the left of those of .to_event()'
            )


def _own_rows(traces: Sequence[Trace], minibatch: Minibatch | None) -> dict[str, Any]:
    """Plates that the model or guide subsamples by itself, one of them if need be while it is whole in the other."""
    plates = [(name, site["fn"]) for trace in traces for name, site in trace.nodes.items() if is_plate(site)]
    named = None if minibatch is None else minibatch.plate
    return {n: fn for n, fn in plates if fn.subsample_size not in (None, fn.size) and n != named}


def _check_local_latents(eager: _Pass, minibatch: Minibatch, by_index: bool) -> None:
    """A guide with a parameter per row needs to know which rows it sees."""
    local = [
        s["name"]
        for s in latent_sites(eager.model_trace)
        if any(f.name == minibatch.plate for f in s["cond_indep_stack"])
    ]
    if not local or not isinstance(eager.guide, AutoGuide):
        return
    if not by_index or isinstance(eager.guide, AutoContinuous):
        raise ValueError(
            f"latent site {local[0]!r} lies in the subsampled plate {minibatch.plate!r}, and guide "
            f"{eager.guide._pyro_name} holds parameters per row: write an amortized guide, or use mean-field with "
            f'plate("{minibatch.plate}", N, subsample_size={minibatch.size}) in the model'
        )


def _implicit(trace: Trace) -> bool:
    """Whether a distribution says that its draw's gradient is implicit."""
    return any(getattr(innermost(s["fn"]), "implicit_gradient", False) for s in random_sites(trace))


def _check_strata(program: Program, eager: _Pass) -> None:
    """A stratified mixture is one site, as wide as a unit, and all uniforms of the guide pick its component."""
    sites = [s for s in random_sites(eager.guide_trace) if strata_of(s) > 1]
    if not sites:
        return
    name, plates = sites[0]["name"], tuple(plate for plate, _, _ in plates_of(sites[0]))
    if len(sites) > 1 or plates != program.structure.unit:
        raise ValueError(
            f"guide site {name!r} is a stratified mixture, which must hold all latents of a unit "
            f'({program.structure.describe()}); give the mixture gradient="implicit"'
        )
    if eager.guide_used.uniform != math.prod(sites[0]["fn"].batch_shape):
        raise ValueError(f"the guide draws uniforms besides those of the stratified mixture at site {name!r}")


def _leaves(eager: _Pass) -> list[Leaf]:
    """Unconstrained tensors of the store, one leaf where names share one; grouped by who reads them.

    Those of a module may be used where it is not registered, and not where it is.
    """

    def read(trace: Trace) -> set[str]:
        return {name for name, site in trace.nodes.items() if site["type"] == "param"}

    in_guide, in_model = read(eager.guide_trace), read(eager.model_trace)
    params, constraints = eager.store["params"], eager.store["constraints"]
    names: dict[int, list[str]] = {}
    for name, tensor in params.items():
        if name in in_guide or name in in_model:
            names.setdefault(id(tensor), []).append(name)
    leaves = []
    for same in names.values():
        used = [id(params[same[0]]) in some for some in eager.used]
        guided, modelled = used if any(used) else (in_guide.intersection(same), in_model.intersection(same))
        group: Group = "shared" if guided and modelled else "phi" if guided else "theta"
        leaves.append(Leaf(same[0], params[same[0]], constraints[same[0]], group))
    return leaves


def _warn_of_constants(eager: _Pass) -> None:
    """Warn of trainable module parameters that nobody registered, or under a name taken before: they stay constant."""
    known = {id(t) for t in eager.store["params"].values()}
    taken = {name.replace("$$$", ".") for name in eager.store["params"]}
    for module in eager.modules:
        for name, parameter in module.module.named_parameters():
            if id(parameter) in eager.tape.strangers and id(parameter) not in known:
                known.add(id(parameter))
                reason, remedy = (
                    ("has the name of one registered before", "give the modules of model and guide different names")
                    if name in taken
                    else ("is not registered", "call pyro.module(name, module) in the model or guide")
                )
                warnings.warn(
                    f"parameter {name!r} of {type(module.module).__name__} {reason} and stays constant; {remedy}, or "
                    "freeze it with requires_grad_(False)",
                    stacklevel=4,
                )


def _custom_functions(eager: _Pass) -> list[str]:
    """Autograd functions written in Python: a graph of forward operations would lose their gradients."""
    total = eager.guide_trace.log_prob_sum() + eager.model_trace.log_prob_sum()
    found: set[str] = set()
    seen, stack = set(), [total.grad_fn if isinstance(total, Tensor) else None]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found.add(type(node).__name__.removesuffix("Backward"))
        stack.extend(parent for parent, _ in node.next_functions)
    return [f"autograd function {name!r} has a hand-written gradient" for name in sorted(found)]


def dependent_sites(guide_trace: Trace, model_trace: Trace, run_model: Callable[[Trace], Trace]) -> set[str]:
    """Observed sites whose density depends on a latent, read from the autograd graph of one more run of the model."""
    observed = [s["name"] for s in random_sites(model_trace) if s["is_observed"]]
    latents = [s["name"] for s in latent_sites(model_trace)]
    reached = joined(model_trace).intersection(observed)
    if any(not guide_trace.nodes[name]["value"].is_floating_point() for name in latents):
        return set(observed)
    if not latents:
        return reached
    drawn = revalued(guide_trace, as_leaf)
    leaves = [drawn.nodes[name]["value"] for name in latents]
    with torch.enable_grad():
        replayed = run_model(drawn)
        replayed.compute_log_prob()
    densities = {name: replayed.nodes[name]["log_prob_sum"] for name in observed}

    def depends(density: Tensor) -> bool:
        if not density.requires_grad:
            return False
        return any(g is not None for g in torch.autograd.grad(density, leaves, retain_graph=True, allow_unused=True))

    return {name for name, density in densities.items() if name in reached or depends(density)}


def _dependent(program: Program, eager: _Pass, batch: Batch) -> set[str]:
    with program.handlers(None, batch):

        def run_model(drawn: Trace) -> Trace:
            replayed = poutine.replay(program.density_model, trace=drawn)
            return poutine.trace(replayed).get_trace(*program.positional(batch), **program.kwargs)

        return dependent_sites(eager.guide_trace, eager.model_trace, run_model)
