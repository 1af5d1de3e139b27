"""Sums over many discrete latents: one after the other where that is as cheap as any order.

opt_einsum takes the pair of factors that is cheapest anywhere, which leaves a chain of states in pieces of which no two
are alike. In the order of the sites the rounds are alike, and become a scan (``recursions.py``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import opt_einsum
from pyro.ops.rings import LogRing

LEAST = 8
"""Latents from which their order is ours."""

DEARER = 2.0
"""Times the operations of opt_einsum's order that ours may take."""


class InOrder(LogRing):  # type: ignore[misc]
    """Pyro's ring of log-densities, which sums many dimensions out in the order in which the terms have them."""

    def sumproduct(self, terms: Sequence[Any], dims: Collection[str]) -> Any:
        """The log of the sum over ``dims`` of the product of terms."""
        inputs = tuple(term._pyro_dims for term in terms)
        order = "".join(dict.fromkeys(dim for dim in "".join(inputs) if dim in dims))
        sizes = {dim: size for term in terms for dim, size in zip(term._pyro_dims, term.shape, strict=True)}
        if len(order) < LEAST or not _is_cheap(inputs, order, tuple(sorted(sizes.items()))):
            return super().sumproduct(terms, dims)
        ordered = [*order, *sorted(set(sizes) - set(order))]
        left = [_laid_out(term, ordered) for term in terms]
        for dim in order:
            together = [term for term in left if dim in term._pyro_dims]
            left = [term for term in left if dim not in term._pyro_dims] + [self._without(dim, together, ordered)]
        return super().sumproduct(left, set())

    def _without(self, dim: str, terms: Sequence[Any], ordered: Sequence[str]) -> Any:
        """One dimension summed out, all being called by their places: those of the next are then called the same."""
        names = [other for other in ordered if any(other in term._pyro_dims for term in terms)]
        called = str.maketrans({name: opt_einsum.get_symbol(place) for place, name in enumerate(names)})
        renamed = [_named(term, term._pyro_dims.translate(called)) for term in terms]
        made = super().sumproduct(renamed, dim.translate(called))
        made._pyro_dims = "".join(name for name in names if name != dim)
        return made


def _named(tensor: Any, dims: str) -> Any:
    """The tensor by other names of its dimensions."""
    made = tensor.permute(*range(tensor.dim()))
    made._pyro_dims = dims
    return made


def _laid_out(term: Any, ordered: Sequence[str]) -> Any:
    """A term with its dimensions in an order."""
    dims = sorted(term._pyro_dims, key=ordered.index)
    made = term.permute(*map(term._pyro_dims.index, dims))
    made._pyro_dims = "".join(dims)
    return made


@functools.lru_cache(maxsize=1024)
def _is_cheap(inputs: tuple[str, ...], order: str, sizes: tuple[tuple[str, int], ...]) -> bool:
    """Whether no tensor on the way is larger than in opt_einsum's order, and all take hardly more operations."""
    size_of = dict(sizes)

    def numbers(dims: Collection[str]) -> int:
        return math.prod(size_of[dim] for dim in dims)

    left = [frozenset(dims) for dims in inputs]
    operations, largest = 0, 0
    for dim in order:
        together = [dims for dims in left if dim in dims]
        union = frozenset.union(*together)
        operations, largest = operations + len(together) * numbers(union), max(largest, numbers(union - {dim}))
        left = [dims for dims in left if dim not in dims] + [union - {dim}]
    output = "".join(sorted(frozenset.union(*left)))
    shapes = [tuple(size_of[dim] for dim in dims) for dims in inputs]
    _, theirs = opt_einsum.contract_path(f"{','.join(inputs)}->{output}", *shapes, shapes=True)
    return bool(largest <= theirs.largest_intermediate and operations <= DEARER * float(theirs.opt_cost))
