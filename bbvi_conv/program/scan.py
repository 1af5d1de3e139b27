r"""Recursions in models: ``scan`` runs a step along a sequence without unrolling it into the traced graph.

A Python loop of 200 rounds traces into 200 copies of its body, thousands of operations that take minutes to compile.
``scan`` traces the body once, as an operation of its own, and compiled code runs it as a loop. Its derivative is a scan
in the other direction, so that gradients and curvature stay loops as well.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._library.custom_ops import CustomOpDef
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from bbvi_conv.program.aten_graph import to_graph
from bbvi_conv.program.constants import overwritten
from bbvi_conv.program.device import by_default
from bbvi_conv.program.graph_module import Kind, WrittenLate
from bbvi_conv.program.graphs import give_anew, is_dear, lift, result_of, simplify, widths
from bbvi_conv.program.surroundings import surroundings
from bbvi_conv.program.tracer import tracing


class Body(NamedTuple):
    """One round as a graph ``(carry..., x..., fixed...) -> (carry..., y...)`` of flat tensors.

    ``plain`` is a simpler one, without derivatives. The last ``kept`` of the ys are there for the derivative, which
    would have to compute them again. ``blocks``, where there are any, run several rounds at once, by how many, most
    first; each takes rows of the xs and gives what the operation does.
    """

    graph: GraphModule
    plain: GraphModule
    carry: int
    moving: int
    results: tuple[tuple[torch.Size, torch.dtype], ...]
    kept: int = 0
    blocks: tuple[tuple[int, Callable[..., Sequence[Tensor]]], ...] = ()

    def pieces(self, length: int) -> Iterator[tuple[int, Callable[..., Sequence[Tensor]] | None]]:
        """Of so many rounds those that run at once, by how many, and what runs them; nothing for a single round."""
        for size, run in self.blocks or ((1, None),):
            for _ in range(length // size):
                yield size, run
            length %= size


BODIES: dict[str, Body] = {}
"""Bodies by the digest of their code, which stands for them in a graph."""


def scan(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, *, reverse: bool = False) -> tuple[Any, Any]:
    r"""Run ``carry, y = step(carry, x)`` along the leading dimension of ``xs``; the last carry and all ``y``.

    .. math:: c_t, y_t = f(c_{t-1}, x_t), \quad t = 1, \dots, T

    In a model that is traced the loop stays a loop; elsewhere it is a Python loop.

    Args:
        step: a pure function of tensors; it may use tensors and modules of the functions around it, and modules and
            parameters of its file. No sample sites: draw before the loop, and pass the values in ``xs``.
        carry: tensors, or nested tuples, lists and dicts of them, whose shapes and types ``step`` keeps.
        xs: tensors ``(T, ...)``, nested likewise; T is at least 1.
        reverse: from the last round to the first; ``y_t`` still lies at t.

    Returns:
        The carry after the last round, and what ``y`` holds, each ``(T, ...)``.

    Raises:
        ValueError: ``xs`` of different lengths or empty, or a carry that changes its shape, type or structure.

    Example:
        >>> total, sums = scan(lambda s, x: (s + x, s + x), torch.tensor(0.0), torch.tensor([1.0, 2.0, 3.0]))
        >>> sums.tolist()
        [1.0, 3.0, 6.0]
    """
    length = _length(xs)
    tracer = tracing()
    if tracer is None:
        return _by_python(step, carry, xs, length, reverse)
    flat_carry, carry_spec = tree_flatten(carry)
    flat_xs, xs_spec = tree_flatten(xs)
    around, others = surroundings(step)
    # `+ 0` hands a module's parameter to whoever stands in for it: the noise tape answers operations, not names
    fixed = [t + 0 if isinstance(t, nn.Parameter) else t for t in around]
    y_spec: Any = None

    def one(*flat: Tensor) -> tuple[Tensor, ...]:
        nonlocal y_spec
        first, second = len(flat_carry), len(flat_carry) + len(flat_xs)
        given = tree_unflatten(list(flat[:first]), carry_spec), tree_unflatten(list(flat[first:second]), xs_spec)
        with others(flat[second:]):
            new, y = step(*given)
        _check(carry, new)
        flat_y, y_spec = tree_flatten(y)
        return (*tree_leaves(new), *flat_y)

    made = _run(one, flat_carry, flat_xs, fixed, reverse=reverse, outer=tracer, stops=True)
    last, ys = made[: len(flat_carry)], made[2 * len(flat_carry) :]
    return tree_unflatten(list(last), carry_spec), tree_unflatten(list(ys), y_spec)


def operations(graph: GraphModule) -> tuple[int, int]:
    """Operations that are written down in a graph and in the rounds of its scans; and those that a run of it makes.

    Rounds that are fused make those of one.
    """
    written = made = len(graph.graph.nodes)
    for _, body, length in scans(graph):
        more, run = operations(body.plain)
        written, made = written + more, made + sum(1 for _ in body.pieces(length)) * run
    return written, made


def work(graph: GraphModule) -> int:
    """Numbers that an evaluation of a graph computes in all, in the rounds of its scans too."""
    return sum(widths(graph)) + sum(length * work(body.plain) for _, body, length in scans(graph))


def scans(graph: GraphModule) -> list[tuple[Node, Body, int]]:
    """The scans of a graph, not those within their rounds: the body of each, and how many rounds there are."""
    nodes = graph.graph.find_nodes(op="call_function", target=torch.ops.bbvi_conv.scan.default)
    return [(node, BODIES[node.args[0]], node.args[2][0].meta["tensor_meta"].shape[0]) for node in nodes]


def repeated(
    function: Callable[..., tuple[Tensor, ...]],
    carry: list[Tensor],
    xs: list[Tensor],
    fixed: list[Tensor],
    length: int,
) -> list[Tensor]:
    """What the rounds ``(carry..., x..., fixed...) -> (carry..., y...)`` of a function made of graphs give."""
    if not xs:  # nothing but the number of rounds is known of them
        count, inner = len(carry), function
        xs, function = [carry[0].new_zeros(length)], lambda *flat: inner(*flat[:count], *flat[count + 1 :])
    return _run(function, carry, xs, fixed, stops=True)[2 * len(carry) :]


def _run(
    function: Callable[..., Any],
    carry: list[Tensor],
    xs: list[Tensor],
    fixed: list[Tensor],
    *,
    reverse: bool = False,
    **how: Any,
) -> list[Tensor]:
    """The operation over a function that is traced as :func:`_register` does."""
    name, constants, _ = _register(function, carry, [x[0] for x in xs], fixed, **how)
    made: list[Tensor] = torch.ops.bbvi_conv.scan(
        name, carry, [x.contiguous() for x in xs], [*fixed, *constants], reverse
    )
    return made[: len(made) - BODIES[name].kept]


def _length(xs: Any) -> int:
    lengths = {len(x) for x in tree_leaves(xs) if isinstance(x, Tensor) and x.dim()}
    if len(lengths) != 1 or 0 in lengths or not all(isinstance(x, Tensor) and x.dim() for x in tree_leaves(xs)):
        raise ValueError(f"scan needs xs of tensors (T, ...) with one T of at least 1, got lengths {sorted(lengths)}")
    return int(lengths.pop())


def _by_python(step: Any, carry: Any, xs: Any, length: int, reverse: bool) -> tuple[Any, Any]:
    ys = []
    for t in reversed(range(length)) if reverse else range(length):
        new, y = step(carry, tree_map(lambda x, t=t: x[t], xs))
        _check(carry, new)
        carry = new
        ys.append(y)
    return carry, tree_map(lambda *parts: torch.stack(parts), *(ys[::-1] if reverse else ys))


def _check(before: Any, after: Any) -> None:
    (old, spec), (new, other) = tree_flatten(before), tree_flatten(after)
    kinds = [[(tuple(t.shape), t.dtype) for t in leaves] for leaves in (old, new)]
    if spec != other or kinds[0] != kinds[1]:
        raise ValueError(f"step must keep the carry's shapes and types: it was {kinds[0]}, it became {kinds[1]}")


# ---- bodies ----


def _apart(function: Callable[[], Any]) -> Any:
    """Run in a thread of its own, which sees nothing of the tracing, mapping and handling around it.

    Derivatives are computed in that thread as well: on a CUDA device torch has one thread for all, and where a scan is
    differentiated that is the one that waits here.
    """
    done: list[Any] = []
    failed: list[BaseException] = []
    device = torch.get_default_device()

    def run() -> None:
        try:
            with torch.autograd.set_multithreading_enabled(False), by_default(device):
                done.append(function())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


def _register(
    function: Callable[..., Any],
    carry: Sequence[Tensor],
    x: Sequence[Tensor],
    fixed: Sequence[Tensor],
    *,
    known: int = 0,
    outer: Any = None,
    stops: bool = False,
) -> tuple[str, list[Tensor], list[bool]]:
    """Trace a round on tensors of these shapes.

    The last ``known`` results of the function are at hand, as further xs, and need not be given.
    ``outer`` holds the tensors of the tracing around a round of the user's own, which may hold mutations as well;
    ``stops`` keeps what is detached so in every derivative, and gives what is dear to compute for it.

    Returns:
        The name of the body; constants, which are further fixed inputs; and which of those known it reads.
    """
    given = (*carry, *x, *fixed)
    kinds = [Kind.of(t) for t in given]

    def trace() -> tuple[str, list[Tensor], list[bool]]:
        example = [_example(t, kind) for t, kind in zip(given, kinds, strict=True)]
        last = [t.detach().clone() for t in function(*example)[-known:]] if known else []
        graph = to_graph(lambda *flat: function(*flat[: len(given)]), *example, *last, functional=outer is not None)
        for name in {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}:
            if outer is not None and getattr(graph, name) in outer:
                raise ValueError(
                    "the step of a scan uses a tensor that depends on parameters and is no variable of the function "
                    "around it: pass it in the carry, in xs, or as a local variable"
                )
        for node in graph.graph.nodes:
            give_anew(node)
        _replace_detach(graph, torch.ops.bbvi_conv.stop.default if stops else None)
        kept = _keep_dear(graph) if stops else 0
        read = _read_known(graph, known, len(carry) + len(x))
        graph, constants = lift(graph, numbers=False)
        count = len(x) + sum(read)
        name = name_of(graph, kinds, len(carry), count, kept)
        if name not in BODIES:
            first, second = example[: len(carry) + len(x)], example[len(carry) + len(x) :]
            used = [t for t, reads in zip(last, read, strict=True) if reads]
            made = graph(*first, *used, *second, *constants)
            results = tuple((m.shape, m.dtype) for m in made)
            BODIES[name] = Body(graph, _plain(graph), len(carry), count, results, kept)
        return name, constants, read

    found: tuple[str, list[Tensor], list[bool]] = _apart(trace)
    return found


def name_of(graph: GraphModule, kinds: Iterable[Kind], *counts: int) -> str:
    """The name of a body: a digest of its code, the kinds of its inputs, and how many are carried and move."""
    code = f"{graph.code}\n{list(kinds)}\n{counts}"
    return hashlib.sha256(code.encode()).hexdigest()[:24]


def _keep_dear(graph: GraphModule) -> int:
    """Let a round give what is dear to compute, but what it gives anyway; how many tensors these are."""
    end = graph.graph.output_node()
    made = list(end.args[0])  # type: ignore[arg-type]
    without = overwritten(graph).union(made)
    dear = [n for n in graph.graph.nodes if is_dear(result_of(n)) and "tensor_meta" in n.meta and n not in without]
    end.args = ([*made, *dear],)
    return len(dear)


def _read_known(graph: GraphModule, count: int, place: int) -> list[bool]:
    """Read the last results of a round, so many that are known, where they are used; which of them are.

    They are the last inputs; those that are read take their ``place`` behind the xs, and the others go.
    """
    if not count:
        return []
    end = graph.graph.output_node()
    made = list(end.args[0])  # type: ignore[arg-type]
    end.args = (made[:-count],)
    inputs, without = graph.graph.find_nodes(op="placeholder"), overwritten(graph)
    for node, known in zip(made[-count:], inputs[-count:], strict=True):
        if node.op == "call_function" and node not in without:
            node.replace_all_uses_with(known)
    graph.graph.eliminate_dead_code()
    read, last = [], inputs[place - 1]
    for known in inputs[-count:]:
        read.append(bool(known.users))
        if known.users:
            last.append(known)
            last = known
        else:
            graph.graph.erase_node(known)
    graph.recompile()
    return read


def _example(tensor: Tensor, kind: Kind) -> Tensor:
    """A value to trace with: that of this run where it is at hand, since not every operation takes zeros."""
    if torch._is_functional_tensor(tensor):
        torch._sync(tensor)  # type: ignore[attr-defined,no-untyped-call]
        tensor = torch._from_functional_tensor(tensor)
    if is_functorch_wrapped_tensor(tensor) or type(tensor) not in (Tensor, nn.Parameter):
        return torch.zeros(kind.shape, dtype=kind.dtype, device=kind.device)
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _replace_detach(graph: GraphModule, stop: Any) -> None:
    """Make every ``detach`` the given operation, or nothing.

    What a user detaches has to stay so in every derivative. The transposed derivatives of a round are traced through
    autograd, which detaches what it saves; those, differentiated again, must not lose a term.
    """
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        if stop is not None:
            node.target = stop
        else:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.graph.erase_node(node)
    graph.recompile()


def _plain(graph: GraphModule) -> GraphModule:
    """The graph without derivatives: simpler, unless that would make constants of it, which a body has none of."""

    def copied() -> GraphModule:
        found = WrittenLate(graph, copy.deepcopy(graph.graph))
        for node in found.graph.find_nodes(op="call_function", target=torch.ops.bbvi_conv.stop.default):
            node.replace_all_uses_with(node.args[0])
        found.graph.eliminate_dead_code()
        return found

    simple, constants = lift(simplify(copied()), numbers=False)
    return copied() if constants else simple


# ---- the operations ----


def _operation(function: Callable[..., Any]) -> CustomOpDef:
    """An operation of ours of that name, whose first call does not import torch's compiler in order to keep it out."""
    made = torch.library.custom_op(f"bbvi_conv::{function.__name__.strip('_')}", function, mutates_args=())
    for device in getattr(made, "_backend_fns", {}):
        made._backend_fns[device] = function
    return made


@_operation
def _stop(x: Tensor) -> Tensor:
    """``detach`` of a scan's body: the same value, no derivative of any order."""
    return x.clone()


_stop.register_fake(torch.empty_like)
_stop.register_autograd(lambda ctx, grad: torch.zeros_like(grad))
_stop.register_vmap(lambda info, in_dims, x: (torch.ops.bbvi_conv.stop(x), in_dims[0]))


@_operation
def _scan(name: str, carry: list[Tensor], xs: list[Tensor], fixed: list[Tensor], reverse: bool) -> list[Tensor]:
    """Last carry, the carry before each round, and what each round gives."""
    body = BODIES[name]
    left, now = len(xs[0]), carry
    parts: list[tuple[Tensor, ...]] = []
    rows = [] if body.blocks else [x.unbind() for x in xs]
    for size, run in body.pieces(left):
        start = left - size if reverse else len(xs[0]) - left
        if run is None:
            made = body.plain(*now, *(row[start] for row in rows), *fixed)
            parts.append((*now, *made[body.carry :]))
        else:
            made = run(*now, *(x[start : start + size] for x in xs), *fixed)
            parts.append(tuple(made[body.carry :]))
        now, left = list(made[: body.carry]), left - size
    join = torch.cat if body.blocks else torch.stack
    columns = zip(*(reversed(parts) if reverse else parts), strict=True)
    last = (c.clone(memory_format=torch.contiguous_format) for c in now)
    return [*last, *(join(column) for column in columns)]


@_scan.register_fake
def _(name: str, carry: list[Tensor], xs: list[Tensor], fixed: list[Tensor], reverse: bool) -> list[Tensor]:
    length, body = len(xs[0]), BODIES[name]
    ys = [carry[0].new_empty((length, *shape), dtype=dtype) for shape, dtype in body.results[body.carry :]]
    return [*(c.new_empty(c.shape) for c in carry), *(c.new_empty((length, *c.shape)) for c in carry), *ys]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    name, carry, xs, fixed, reverse = inputs
    ctx.name, ctx.reverse, ctx.sizes = name, reverse, (len(carry), len(xs), len(fixed))
    ctx.save_for_backward(*carry, *xs, *fixed, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Any) -> Any:
    """The scan of the rounds' transposed derivatives, in the other direction."""
    saved = iter(ctx.saved_tensors)
    start, xs, fixed = ([next(saved) for _ in range(size)] for size in ctx.sizes)
    carried, moving, _ = ctx.sizes
    made = list(saved)
    last, before, ys = made[:carried], made[carried : 2 * carried], made[2 * carried :]
    d_last, d_rows = grads[:carried], grads[carried:]
    lives = [_is_float(t) for t in (*start, *xs, *fixed)]
    d_fixed = [torch.zeros_like(f) for f in fixed if _is_float(f)]
    back, constants, read = _transposed(ctx.name, start, xs, fixed, [d is not None for d in d_rows])
    live_last = [torch.zeros_like(c) if d is None else d for d, c in zip(d_last, start, strict=True) if _is_float(c)]
    made = torch.ops.bbvi_conv.scan(
        back,
        [*live_last, *d_fixed],
        [
            *before,
            *xs,
            *(d.contiguous() for d in d_rows if d is not None),
            *itertools.compress(ys, read),
            *(
                _after(*both, ctx.reverse)
                for both in itertools.compress(zip(last, before, strict=True), read[len(ys) :])
            ),
        ],
        [*fixed, *constants],
        not ctx.reverse,
    )
    total = len(live_last) + len(d_fixed)
    out = iter([*made[: len(live_last)], *made[2 * total :], *made[len(live_last) : total]])
    flat = [next(out) if live else None for live in lives]
    return None, flat[:carried], flat[carried : carried + moving], flat[carried + moving :], None


def _after(last: Tensor, before: Tensor, reverse: bool) -> Tensor:
    """What is carried out of each round, from what is carried into each and out of the last."""
    return torch.cat([last[None], before[:-1]] if reverse else [before[1:], last[None]])


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _transposed(
    name: str, carry: Sequence[Tensor], xs: Sequence[Tensor], fixed: Sequence[Tensor], has: Sequence[bool]
) -> tuple[str, list[Tensor], list[bool]]:
    """The body ``(d carry, sum of d fixed | carry, x, d before, d y, y, after | fixed) -> (d carry, sum | d x)``.

    ``has`` tells which of the carries before the rounds, and of the ys, have a derivative; what is returned last, which
    of the ys and of the carries after the rounds it reads.
    """
    body = BODIES[name]
    counts = len(carry), len(xs)
    kinds = [*((c.shape, c.dtype) for c in carry), *body.results[body.carry :]]
    given = [kind for kind, there in zip(kinds, has, strict=True) if there]

    def function(*flat: Tensor) -> tuple[Tensor, ...]:
        rest = iter(flat)
        d_carry = [next(rest) for c in carry if _is_float(c)]
        sums = [next(rest) for f in fixed if _is_float(f)]
        state, x = [next(rest) for _ in carry], [next(rest) for _ in xs]
        derivatives = [next(rest) if there else None for there in has]
        d_kept, d_y = derivatives[: len(carry)], derivatives[len(carry) :]
        inputs = [*state, *x, *rest]
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() if _is_float(t) else t for t in inputs]
            outputs = body.graph(*inputs)
            live = [t for t in inputs if _is_float(t)]
            new = (o for o in outputs[: len(carry)] if _is_float(o))
            of_outputs = [*zip(new, d_carry, strict=True), *zip(outputs[len(carry) :], d_y, strict=True)]
            pairs = [(o, d) for o, d in of_outputs if d is not None and o.requires_grad]
            found = (
                torch.autograd.grad(
                    [o for o, _ in pairs],
                    live,
                    [d for _, d in pairs],
                    create_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                if pairs
                else [torch.zeros_like(t) for t in live]
            )
        by_input = iter(found)
        got = [next(by_input) if _is_float(t) else None for t in inputs]
        first, second = counts[0], sum(counts)
        back = [(g, d) for g, d in zip(got[:first], d_kept, strict=True) if g is not None]
        added = [s + g for s, g in zip(sums, (g for g in got[second:] if g is not None), strict=True)]
        made = [*(g if d is None else g + d for g, d in back), *added, *(g for g in got[first:second] if g is not None)]
        return (*made, *outputs[first:], *outputs[:first])

    device = carry[0].device
    return _register(
        function,
        [*(c for c in carry if _is_float(c)), *(f for f in fixed if _is_float(f))],
        [*carry, *(x[0] for x in xs), *(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in given)],
        fixed,
        known=len(body.results),
    )


_scan.register_autograd(_backward, setup_context=_setup)


@_scan.register_vmap
def _(
    info: Any, in_dims: Any, name: str, carry: list[Tensor], xs: list[Tensor], fixed: list[Tensor], reverse: bool
) -> Any:
    """Every carry is mapped; ``xs`` and what is fixed only where they differ."""
    size, body = info.batch_size, BODIES[name]
    _, carry_dims, xs_dims, fixed_dims, _ = in_dims
    carry = [
        c.movedim(d, 0) if d is not None else c.expand(size, *c.shape) for c, d in zip(carry, carry_dims, strict=True)
    ]
    xs = [x if d is None else x.movedim(d, 1) for x, d in zip(xs, xs_dims, strict=True)]
    fixed = [f if d is None else f.movedim(d, 0) for f, d in zip(fixed, fixed_dims, strict=True)]
    mapped = (*[0] * len(carry), *(None if d is None else 0 for d in (*xs_dims, *fixed_dims)))

    def function(*flat: Tensor) -> Any:
        return torch.vmap(body.graph, mapped)(*flat)

    made = _run(function, [c.contiguous() for c in carry], xs, fixed, reverse=reverse)
    return made, [*[0] * len(carry), *[1] * (len(made) - len(carry))]


__all__ = ["BODIES", "Body", "name_of", "operations", "repeated", "scan", "scans", "work"]
