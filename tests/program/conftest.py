"""The law that every program obeys: both engines give Pyro's gradient at the same noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bbvi_conv.engine import Calculus
from bbvi_conv.engine.streams import Feed
from bbvi_conv.objectives import ELBO
from bbvi_conv.program import Program
from bbvi_conv.program.trace import TracedLogWeights

DRAWS = 3


@pytest.fixture(scope="session")
def agrees_with_pyro(moved, draw, pyro_gradient) -> Callable[..., float]:
    """``agrees_with_pyro(program, scale=1.0, traced=True)``: losses and gradients to 1e-9 relative, both engines.

    ``scale``: N/B where Pyro sees a plate of B rows that stand for N. Gives the largest relative error of a gradient.
    """

    def check(program: Program, *, scale: float = 1.0, traced: bool = True) -> float:
        x, noise = moved(program), draw(program, DRAWS, 1, seed=2)
        rows = None
        if program.minibatch is not None:
            rows = torch.randint(
                program.total, (DRAWS, program.minibatch.size), generator=torch.Generator().manual_seed(3)
            )
        expected = []
        for j in range(DRAWS):
            batch = program.batch(None if rows is None else rows[j])
            expected.append(pyro_gradient(program, x, noise.at(j).at(0), batch))
        loss, grad = (scale * torch.stack(column) for column in zip(*expected, strict=True))
        assert grad.dtype == torch.float64
        assert (grad.norm(dim=1) > 1e-3).all()  # power: there is a gradient to get wrong
        worst = 0.0
        for log_weights in (program.log_weights, TracedLogWeights(program)) if traced else (program.log_weights,):
            got, losses = Calculus(program, ELBO(), log_weights, 1.0).gradients(x, Feed(noise, rows))
            torch.testing.assert_close(losses, loss, rtol=1e-9, atol=0)
            assert ((got - grad).norm(dim=1) <= 1e-9 * grad.norm(dim=1)).all()
            worst = max(worst, float(((got - grad).norm(dim=1) / grad.norm(dim=1)).max()))
        return worst

    return check
