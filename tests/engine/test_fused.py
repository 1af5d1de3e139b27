"""Where torch's compiler keeps what it makes, and rounds of scans that it makes one of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.fx import GraphModule

import bbvi_conv as bc
from bbvi_conv.engine import fused as module
from bbvi_conv.engine.fused import fused, with_fused_rounds
from bbvi_conv.program.aten_graph import to_graph
from bbvi_conv.program.scan import operations

X = torch.linspace(-1, 1, 14, dtype=torch.float64).view(7, 2)


@pytest.mark.parametrize("named", ["nobody", "the compiler", "the user"])
def test_code_is_kept_in_a_folder_of_the_users_alone(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler names its own folder, which others may write to, in the environment: that is no user's choice."""
    own, users = tmp_path / "own", tmp_path / "users"
    monkeypatch.setenv("BBVI_CONV_CACHE", str(own))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if named != "nobody":
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(users) if named == "the user" else default_cache_dir())
    x = torch.randn(5)
    run = fused(to_graph(lambda x: torch.sin(x) + len(named), x))
    torch.testing.assert_close(run(x), torch.sin(x) + len(named))
    assert any(users.rglob("*.py")) == (named == "the user")
    assert any((own / "inductor").rglob("*.py")) == (named != "the user")


def graph_of(reverse: bool) -> GraphModule:
    """Gradients of what a scan within a scan gives, with carries that are turned in every round."""

    def turn(turned: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        return (0.5 * turned + number).t(), turned.sum()

    def step(carry: tuple[Tensor, Tensor], row: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        level, turned = carry
        turned, sums = bc.scan(turn, turned, row)
        level = torch.tanh(level + row) + turned[0] + sums.mean()
        return (level, (level[:, None] * row).t()), level * row

    def loss(start: Tensor, x: Tensor) -> Tensor:
        (last, _), ys = bc.scan(step, (start, torch.outer(start, start)), x, reverse=reverse)
        return (ys**2).sum() + last.sum()

    graph = to_graph(loss, X[0], X)

    def gradients(start: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        start, x = start.detach().requires_grad_(), x.detach().requires_grad_()
        return torch.autograd.grad(graph(start, x), (start, x))

    return to_graph(gradients, X[0], X, functional=False)


@pytest.mark.parametrize("reverse", [False, True])
def test_fused_rounds_are_rounds(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_sizes", lambda length, most: [3, 1])
    graph = graph_of(reverse)
    expected = graph(X[3], X)
    _, one_by_one = operations(graph)
    assert with_fused_rounds(graph) is graph
    _, together = operations(graph)
    assert together < one_by_one / 2
    found: Any = fused(graph)(X[3], X)
    for made, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)


def test_rounds_at_once_leave_none_over_where_they_can() -> None:
    sizes = [module._sizes(*case) for case in [(200, 20), (200, 12), (199, 12), (7, 100), (7, 1), (11, 4)]]
    assert sizes == [[20], [10], [12, 7], [7], [1], [4, 3]]
