"""A graph does what the function did, whatever it is run on; it costs no import of torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bbvi_conv.program.aten_graph import Untraceable, to_graph
from bbvi_conv.program.graph_module import Kind
from bbvi_conv.program.graphs import results

TABLE = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        value = (TABLE @ y.tanh()).exp().sum() + y.cumprod(0).sum()
        (slope,) = torch.autograd.grad(value, y)
    return value.detach(), slope


def written_in_place(x: Tensor) -> Tensor:
    out = torch.zeros(3)
    out[0] = x[0]
    out[1:].add_(x.sum())
    return out * x[1]


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "mapped": lambda x: torch.vmap(lambda row: torch.where(row > 2, row * x, -x).sum())(TABLE),
    "several results": lambda x: tuple(part * 2 for part in torch.linalg.slogdet(TABLE.T @ TABLE + torch.outer(x, x))),
    "in place": written_in_place,
    "its own input and a constant": lambda x: (x, TABLE, 2 * x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_graph_does_what_the_function_does(name: str) -> None:
    function = FUNCTIONS[name]
    graph = to_graph(function, torch.tensor([0.3, -0.2]))
    for x in (torch.tensor([0.3, -0.2]), torch.tensor([-1.0, 0.7])):
        torch.testing.assert_close(graph(x), function(x), rtol=0, atol=0)
    first, second = (function(torch.tensor(values)) for values in ([0.3, -0.2], [-1.0, 0.7]))
    with pytest.raises(AssertionError):  # power: the input matters
        torch.testing.assert_close(first, second)


def test_a_derivative_is_noted_with_shapes_and_types() -> None:
    graph = to_graph(gradient, torch.zeros(2), functional=False)
    x = torch.tensor([0.3, -0.2])
    torch.testing.assert_close(graph(x), gradient(x), rtol=0, atol=0)
    kinds = [node.meta.get("tensor_meta") for node in graph.graph.nodes]
    assert kinds[0] == Kind(torch.Size([2]), torch.float32, torch.device("cpu"))
    assert Kind(torch.Size([3, 2]), torch.float32, torch.device("cpu")) in kinds
    assert [kind.shape for kind in results(graph)] == [torch.Size([]), torch.Size([2])]


def test_python_may_ask_for_the_value_of_a_constant_alone() -> None:
    graph = to_graph(lambda x: x * 2 if bool((TABLE.sum(0) > 8).all()) else x, torch.zeros(2))
    assert torch.equal(graph(torch.ones(2)), torch.full((2,), 2.0))
    with pytest.raises(Untraceable, match="data-dependent control flow"):
        to_graph(lambda x: x * 2 if bool((x.sum() + TABLE.sum()) > 8) else x, torch.zeros(2))


FIRST_STEP = """
import sys
import pyro, pyro.distributions as dist, torch
import bbvi_conv as bc
from bbvi_conv.run import Run, Settings

def model():
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

program = bc.build(model, family=bc.FullRank())
run = Run(program, Settings(engine="traced"))
run.engine.advance(run.start(program.initial()).carry, run.stream, 0, 1)
"""
SCAN = FIRST_STEP.replace(
    'pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))',
    """z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    last, _ = bc.scan(lambda level, x: (0.5 * level + x, level), torch.zeros(()), z)
    pyro.factor("last", -last.square())""",
)
FIT = """
import sys
import bbvi_conv as bc
from bbvi_conv.model_file import load_module

schools = load_module("eight_schools")
fit = bc.fit(schools.model, args=schools.data(), family=bc.FullRank(), max_steps=500, engine="traced", progress=False)
assert fit.state.checks[-1].gap.available
"""
COUNTS = """
import sys
import torch
import pyro, pyro.distributions as dist
import bbvi_conv as bc

def model(counts, parts):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.sample("parts", dist.Multinomial(4, torch.stack([rate, rate + 1])), obs=parts)
    with pyro.plate("rows", len(counts)):
        pyro.sample("counts", dist.NegativeBinomial(rate, probs=torch.tensor(0.4)), obs=counts)

fit = bc.fit(model, args=(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([1.0, 3.0])), max_steps=50, progress=False)
fit.to_arviz(10)
assert "sympy" not in sys.modules
"""
SHOW = """
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
"""


@pytest.mark.skipif(
    not hasattr(TorchDispatchMode, "_should_skip_dynamo"), reason="this torch wraps every mode by its compiler"
)
@pytest.mark.parametrize(
    "script", [FIRST_STEP, SCAN, FIT, COUNTS], ids=["first step", "scan", "fit with a check", "new data"]
)
def test_what_is_not_compiled_imports_no_compiler(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script + SHOW], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
