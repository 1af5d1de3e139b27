"""Write down every ATen operation of one run of a function, as a graph.

torch's own ``make_fx`` does the same with more notes on every value, and imports a compiler before; this takes a small
part of its time, which a user waits for at the start of every fit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.weak import WeakTensorKeyDictionary

from bbvi_conv.program.graph_module import Kind, WrittenLate

_aten: Any = torch.ops.aten


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that run inside, on the values of this run.

    It sees what is left of them under autograd, ``vmap`` and functionalisation: operations on plain tensors.

    Args:
        decompositions: operation -> a function of the same arguments that is traced in its place.
    """

    def __init__(self, decompositions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self.constants: dict[str, Tensor] = {}
        self._decompositions = decompositions
        self._nodes: MutableMapping[Tensor, Node] = WeakTensorKeyDictionary()
        self._fixed: MutableMapping[Tensor, Node] = WeakTensorKeyDictionary()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch should import its compiler in order to keep it out of here: no, it is not in use."""
        return False

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a value was computed inside, or is an input."""
        return tensor in self._nodes

    def input(self, tensor: Tensor) -> None:
        """Make a tensor the next input of the graph."""
        self._note(tensor, self.graph.placeholder(f"arg{len(self.graph.nodes)}"))

    def output(self, made: Any) -> GraphModule:
        """The graph, which gives what ``made`` holds."""
        self.graph.output(self._arguments(made))
        return WrittenLate(self.constants, self.graph)

    def _note(self, tensor: Tensor, node: Node) -> None:
        node.meta["tensor_meta"] = Kind.of(tensor)
        self._nodes[tensor] = node

    def _arguments(self, value: Any) -> Any:
        return map_aggregate(value, lambda x: self._node(x) if isinstance(x, Tensor) else x)

    def _node(self, tensor: Tensor) -> Node:
        """The node of a value; a tensor from outside is a constant of the graph."""
        node = self._nodes.get(tensor) or self._fixed.get(tensor)
        if node is None:
            name = f"_tensor_constant{len(self.constants)}"
            self.constants[name] = tensor
            node = self.graph.create_node("get_attr", name, (), {})
            node.meta["tensor_meta"] = Kind.of(tensor)
            self._fixed[tensor] = node
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        with self:
            rule = self._decompositions.get(func)
            made = func.decompose(*args, **kwargs) if rule is None else rule(*args, **kwargs)
        if made is not NotImplemented:
            return made
        if torch.Tag.data_dependent_output in func.tags:
            return self._read(func, args, kwargs)
        if func is _aten.lift_fresh.default:
            func = _aten.lift_fresh_copy.default
        given, named = self._arguments(tuple(args)), self._arguments(kwargs)
        node = self.graph.create_node("call_function", func, given, named, func.overloadpacket.__name__)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self._note(out, node)
        elif isinstance(out, (tuple, list)):
            for index, part in enumerate(out):
                if isinstance(part, Tensor):
                    self._note(part, self.graph.call_function(operator.getitem, (node, index)))
        return out

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A value that Python asks for; only a constant of the program has one."""
        nodes: list[Node] = []
        map_aggregate(self._arguments((tuple(args), kwargs)), lambda x: nodes.append(x) if isinstance(x, Node) else x)
        while nodes:
            node = nodes.pop()
            if node.op == "placeholder" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise RuntimeError("Python asks for a value that is computed: data-dependent control flow, or .item()")
            nodes.extend(node.all_input_nodes)
        return func(*args, **kwargs)


def tracing() -> Tracer | None:
    """The tracer that notes what runs here, if there is one."""
    stack = reversed(_get_current_dispatch_mode_stack())
    return next((mode for mode in stack if isinstance(mode, Tracer)), None)


def trace(
    function: Callable[..., Any], *example: Tensor, decompositions: Mapping[Any, Callable[..., Any]]
) -> GraphModule:
    """The graph of ``function`` on tensors like ``example``, which are told apart by identity."""
    tracer = Tracer(decompositions)
    for tensor in example:
        tracer.input(tensor)
    with tracer:
        made = function(*example)
    return tracer.output(made)
