"""Products of matrices by the routines of MKL that torch calls, without torch and Python in between."""

from __future__ import annotations

from functools import cache

import torch

from bbvi_conv.engine.native.matrices import Product, exported, written
from bbvi_conv.engine.native.plan import Kernel

_ROUTINES = {"float": "sgemm_", "double": "dgemm_"}
"""By the type of the numbers in C++."""

HELPERS = "".join(
    f"""
extern "C" void {name}(const char*, const char*, const int64_t*, const int64_t*, const int64_t*, const {kind}*,
                       const {kind}*, const int64_t*, const {kind}*, const int64_t*, const {kind}*, {kind}*,
                       const int64_t*);
"""
    for kind, name in _ROUTINES.items()
)
"""C++ text that the kernels need, once, after that of matrices.

MKL may read 32 bits of these numbers: here that is the same as all 64.
"""

_BODY = """
        const {kind} one = 1, add = {add};
        const int64_t m = {m}, n = {n}, k = {k}, lda = {a.step}, ldb = {b.step}, ldc = {c.step};
        {bias}
        {routine}("{turn_b}", "{turn_a}", &n, &m, &k, &one, b, &ldb, a, &lda, &add, c, &ldc);
"""


@cache
def available() -> bool:
    """Whether torch brings MKL and lets others call it."""
    mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return mkl and all(map(exported, _ROUTINES.values()))


def kernel(product: Product, name: str) -> tuple[Kernel, str]:
    """A product of float32 or float64 matrices; MKL counts by columns, and so computes its transpose."""
    a, b, c, bias, of_rows = product = product if product.c.by_rows else product.turned
    each = "std::fill_n(c + i * ldc, n, bias[i])" if of_rows else "std::copy_n(bias, n, c + i * ldc)"
    body = _BODY.format(
        kind=product.kind,
        routine=_ROUTINES[product.kind],
        **{"a": a, "b": b, "c": c, "m": c.rows, "n": c.columns, "k": a.columns},
        add=0 if bias is None else 1,
        bias="" if bias is None else f"for (int64_t i = 0; i < m; ++i) {each};",
        turn_a="N" if a.by_rows else "T",
        turn_b="N" if b.by_rows else "T",
    )
    return written(name, product.arguments(), body, 1)
