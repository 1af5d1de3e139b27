"""Graphs as modules: what they note of values, their constants, and code that is written when they are first called."""

from __future__ import annotations

import linecache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.graph_module import _loader as fx_sources


class Kind(NamedTuple):
    """What a graph notes of a value, as ``node.meta["tensor_meta"]``."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Kind:
        """That of a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device)


class WrittenLate(_LazyGraphModule):
    """A ``GraphModule`` that writes its code at its first call, and not whenever its graph changes.

    Most graphs here are made from one another and never called. torch would keep the text of the code for ever.
    """

    def _real_recompile(self) -> Any:
        made = super()._real_recompile()
        name = type(self).forward.__code__.co_filename
        fx_sources.eval_cache.pop(name, None)
        linecache.cache.pop(name, None)
        return made


def constant(graph: GraphModule, value: Tensor, name: str) -> Node:
    """A new constant of the graph, at the place where nodes are being inserted."""
    graph.register_buffer(name, value)
    node = graph.graph.create_node("get_attr", name)
    node.meta["tensor_meta"] = Kind.of(value)
    return node
