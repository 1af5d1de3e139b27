"""Sums over many discrete latents in the order of the sites: the same numbers, and only where no order is cheaper."""

from __future__ import annotations

from collections.abc import Sequence

import opt_einsum
import pytest
import torch
from pyro.ops.rings import LogRing
from torch import Tensor

from bbvi_conv.program.elimination import InOrder, _is_cheap

SYMBOLS = [opt_einsum.get_symbol(n) for n in range(100)]


def terms(names: Sequence[str], size: int = 3) -> list[Tensor]:
    gen = torch.Generator().manual_seed(len(names))
    made = []
    for name in names:
        made.append(torch.randn([size] * len(name), generator=gen, dtype=torch.float64))
        made[-1]._pyro_dims = name  # type: ignore[attr-defined]
    return made


def chain(length: int, lags: int = 1, plate: str = "") -> list[str]:
    """Factors of a Markov chain and its emissions, whose dimensions lie now in one order, now in the other."""
    found = []
    for t in range(length):
        state = [SYMBOLS[t - lag] for lag in range(min(t, lags) + 1)]
        found += ["".join(state if t % 2 else state[::-1]) + plate, SYMBOLS[t] + plate]
    return found


STAR = [SYMBOLS[0] + leaf for leaf in SYMBOLS[1:11]]
"""Its hub comes first: summed out first, it would join all leaves."""


@pytest.mark.parametrize(
    ("names", "kept", "ours"),
    [
        (chain(20), "", True),
        (chain(60)[::-1], "", True),
        (chain(15, lags=2), "", True),
        (chain(30, plate=SYMBOLS[80]), SYMBOLS[80], True),
        ([*chain(12), SYMBOLS[90] + SYMBOLS[11]], SYMBOLS[90], True),
        (STAR, "", False),
        (STAR[::-1], "", False),
    ],
)
def test_the_sum_is_the_same_in_whatever_order(names: list[str], kept: str, ours: bool) -> None:
    order = "".join(dict.fromkeys(dim for dim in "".join(names) if dim not in kept))
    sizes = tuple(sorted(dict.fromkeys("".join(names), 3).items(), key=lambda pair: pair[0]))
    assert _is_cheap(tuple(names), order, sizes) == ours
    dims = set(order)
    found, expected = (ring.sumproduct(terms(names), dims) for ring in (InOrder(), LogRing()))
    assert found._pyro_dims == expected._pyro_dims == "".join(sorted(kept))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_all_states_are_gone_through() -> None:
    names = chain(8)
    joint = torch.zeros([3] * 8, dtype=torch.float64)
    for term in terms(names):
        dims = term._pyro_dims  # type: ignore[attr-defined]
        order = sorted(dims)
        shape = [3 if symbol in dims else 1 for symbol in SYMBOLS[:8]]
        joint = joint + term.permute([dims.index(dim) for dim in order]).reshape(shape)
    found = InOrder().sumproduct(terms(names), set(SYMBOLS[:8]))
    torch.testing.assert_close(found, joint.logsumexp(list(range(8))), rtol=1e-12, atol=0)
