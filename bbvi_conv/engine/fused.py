"""Fewer kernels for the same graph, by torch's compiler."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from bbvi_conv.engine.native.cache import folder
from bbvi_conv.program.graph_module import WrittenLate
from bbvi_conv.program.graphs import widest
from bbvi_conv.program.scan import BODIES, Body, operations, scans

_aten: Any = torch.ops.aten

NARROW = 2**22
"""Numbers in the widest tensor of a graph below which kernels that do not wait for each other become one."""

MOST_AT_ONCE = 300
"""Operations of the rounds of a scan that are fused together, at most, but for those of a single round."""


def fused(graph: GraphModule) -> Callable[..., object]:
    """The graph, compiled at its first call for the shapes given there; what was compiled is kept in the private cache.

    Raises:
        UnsafeCache: for the folder of the cache.
    """
    WrittenLate.force_recompile(graph)  # it reads the code
    run = torch.compile(graph, fullgraph=True, dynamic=False, options=_options(graph))

    def quietly(*inputs: Tensor) -> object:
        with _quiet_compiler():
            return run(*inputs)

    return quietly


def with_fused_rounds(graph: GraphModule) -> GraphModule:
    """The graph, where rounds of scans, those within rounds too, run several at once and are fused; changes it.

    A body is compiled for as many rounds as have :data:`MOST_AT_ONCE` operations together, at its first call, once in a
    process, and for those that are left over.
    """
    for node, body, length in scans(graph):
        name, reverse = node.args[0], bool(node.args[-1])
        plain = with_fused_rounds(copy.deepcopy(body.plain))
        sizes = _sizes(length, max(1, MOST_AT_ONCE // operations(plain)[0]))
        node.update_arg(0, key := f"{name} {sizes} {reverse}")
        if key not in BODIES:
            blocks = tuple((size, _fused_anywhere(_rounds(body, plain, size, reverse))) for size in sizes)
            BODIES[key] = body._replace(blocks=blocks)
    graph.recompile()
    return graph


def _sizes(length: int, most: int) -> list[int]:
    """How many rounds run at once: of one size, where one of over half the most allows it."""
    most = min(most, length)
    even = next((size for size in range(most, most // 2, -1) if length % size == 0), None)
    return [even] if even else [most, length % most]


def _rounds(body: Body, plain: GraphModule, size: int, reverse: bool) -> GraphModule:
    """So many rounds ``(carry..., rows of xs..., fixed...)``, with the results of a scan."""
    graph, inner = Graph(), plain.graph.find_nodes(op="placeholder")
    inputs = [graph.placeholder(node.name) for node in inner]
    carry, xs, fixed = inputs[: body.carry], inputs[body.carry :][: body.moving], inputs[body.carry + body.moving :]
    parts = []
    for t in reversed(range(size)) if reverse else range(size):
        rows = [graph.call_function(_aten.select.int, (x, 0, t)) for x in xs]
        made: Any = graph.graph_copy(plain.graph, dict(zip(inner, [*carry, *rows, *fixed], strict=True)))
        parts.append((*carry, *made[body.carry :]))
        carry = list(made[: body.carry])
    columns = zip(*(reversed(parts) if reverse else parts), strict=True)
    graph.output((*carry, *(graph.call_function(_aten.stack.default, (list(column),)) for column in columns)))
    return WrittenLate(plain, graph)


def _fused_anywhere(graph: GraphModule) -> Callable[..., Sequence[Tensor]]:
    """As :func:`fused`, which takes tensors for aligned where its first ones are, for such that lie anywhere."""
    options = _options(graph)
    made: list[Any] = []

    def run(*inputs: Tensor) -> Any:
        if not made:
            unaligned: list[Any] = [t.new_empty(t.numel() + 1)[1:].view(t.shape) for t in inputs]
            with _quiet_compiler():
                made.append(torch._inductor.compile(graph, unaligned, options=options))
        return made[0](*(t.contiguous() for t in inputs))

    return run


def _options(graph: GraphModule) -> dict[str, Any]:
    """Of torch's compiler."""
    return {"combo_kernels": widest(graph) < NARROW}


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """torch's compiler keeps its files in a folder of the user's alone, unless the user has named one; no warnings.

    It names its own folder in the environment as if the user had.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir()
    own = {} if named else {"TORCHINDUCTOR_CACHE_DIR": str(folder() / "inductor")}
    with mock.patch.dict(os.environ, own), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on options that are chosen elsewhere
        yield
