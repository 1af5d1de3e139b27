"""The private interfaces of torch's Inductor that the compiled engine stands on, imported here and nowhere else.

Raises:
    ImportError: where this torch has another Inductor; the engine then says so, and steps run traced.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():  # deprecated parts of torch that torch itself imports
    warnings.simplefilter("ignore")
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.dependencies import StarDep, WeakDep
    from torch._inductor.graph import GraphLowering
    from torch._inductor.inductor_prims import force_stride_order
    from torch._inductor.lowering import register_lowering
    from torch._inductor.scheduler import SchedulerNode
    from torch._inductor.select_algorithm import extern_kernels
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils._ordered_set import OrderedSet

__all__ = [
    "DebugContext",
    "FakeTensorMode",
    "GraphLowering",
    "SchedulerNode",
    "ShapeEnv",
    "TracingContext",
    "V",
    "config",
    "extern_kernels",
    "force_stride_order",
    "fx_graph_cse",
    "recomputed",
    "select_decomp_table",
    "stored",
    "tracing",
]


@torch.library.custom_op("bbvi_conv::stored", mutates_args=())
def stored(value: Tensor) -> Tensor:
    """The same value, in the generated code computed once and kept; Inductor has no such order for single numbers."""
    return value.clone()


@stored.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


@register_lowering(torch.ops.bbvi_conv.stored.default, type_promotion_kind=None)
def _store(value: Any) -> Any:
    value.realize()
    return value


_recompute = SchedulerNode.recompute_size_and_body


def recomputed(node: Any, *args: Any, **kwargs: Any) -> None:
    """Lay out the loops of a node of Inductor's scheduler anew; it waits for the same as before.

    Torch's own forgets that what the node reads is written in place, as diagonals are, and in older versions what else
    it comes after (https://github.com/pytorch/pytorch/pull/185873, 177816): it was fused with what is written there.
    """
    added = OrderedSet(dep for dep in node.read_writes.reads if isinstance(dep, (StarDep, WeakDep)))
    _recompute(node, *args, **kwargs)
    node.set_read_writes(node.read_writes.with_read(added).rename(node.mutation_renames))
