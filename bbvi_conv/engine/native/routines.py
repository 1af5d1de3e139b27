"""Products of matrices by the routines of MKL that torch calls, without torch and Python in between."""

from __future__ import annotations

from functools import cache

import torch

from bbvi_conv.engine.native.matrices import Product, exported
from bbvi_conv.engine.native.plan import Kernel

_NAMES = {"float32": ("sgemm_", "float"), "float64": ("dgemm_", "double")}
"""Routines and types of C++ by the type of the numbers."""

HELPERS = "".join(
    f"""
extern "C" void {name}(const char*, const char*, const int64_t*, const int64_t*, const int64_t*, const {kind}*,
                       const {kind}*, const int64_t*, const {kind}*, const int64_t*, const {kind}*, {kind}*,
                       const int64_t*);
"""
    for name, kind in _NAMES.values()
)
"""C++ text that the kernels need, once. MKL may read 32 bits of these numbers: here that is the same as all 64."""

_KERNEL = """
static void {name}({arguments})
{{
    const {kind} one = 1, add = {add};
    const int64_t m = {m}, n = {n}, k = {k}, lda = {a.step}, ldb = {b.step}, ldc = {c.step};
    {bias}
    {routine}("{turn_b}", "{turn_a}", &n, &m, &k, &one, b, &ldb, a, &lda, &add, c, &ldc);
}}
"""


@cache
def available() -> bool:
    """Whether torch brings MKL and lets others call it."""
    mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return mkl and all(exported(name) for name, _ in _NAMES.values())


def kernel(product: Product, name: str) -> tuple[Kernel, str]:
    """A product of float32 or float64 matrices; MKL counts by columns, and so computes its transpose."""
    a, b, c, bias, of_rows = product if product.c.by_rows else product.turned
    routine, kind = _NAMES[c.view.dtype]
    arguments = [(f"const {kind}*", "a", a.view), (f"const {kind}*", "b", b.view), (f"{kind}*", "c", c.view)]
    filled = ""
    if bias is not None:
        arguments.append((f"const {kind}*", "bias", bias))
        each = "std::fill_n(c + i * ldc, n, bias[i])" if of_rows else "std::copy_n(bias, n, c + i * ldc)"
        filled = f"for (int64_t i = 0; i < m; ++i) {each};"
    text = _KERNEL.format(
        name=name,
        arguments=", ".join(f"{pointer} {letter}" for pointer, letter, _ in arguments),
        kind=kind,
        routine=routine,
        **{"a": a, "b": b, "c": c, "m": c.rows, "n": c.columns, "k": a.columns},
        add=0 if bias is None else 1,
        bias=filled,
        turn_a="N" if a.by_rows else "T",
        turn_b="N" if b.by_rows else "T",
    )
    return Kernel(name, tuple(k for k, _, _ in arguments), tuple(view.place for _, _, view in arguments)), text
