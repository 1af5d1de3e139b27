"""Products of matrices by blocks, for processors on which those of torch's library are slow.

On AMD's processors torch's MKL runs kernels for vectors of 256 bits; oneDNN, which torch brings too, writes its own for
the 512 that newer ones have, and gives them to others as ``at::native::cpublas::brgemm``: a product of blocks of
float32 matrices by rows. What lies by columns is turned before, or the product as a whole is, whichever moves fewer
numbers; the longer side of the result is shared out among the threads.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from bbvi_conv.engine.native.library import processor
from bbvi_conv.engine.native.matrices import Product, exported, part, turned, written
from bbvi_conv.engine.native.plan import Kernel

if TYPE_CHECKING:  # which imports the compiler
    from bbvi_conv.engine.native.recording import Recorder

SHARED = 2**20
"""Multiplications from which a product is worth sharing out among threads."""

_BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"
"""The name of that function in torch's library, by its arguments."""

HELPERS = """
#include <ATen/native/CPUBlas.h>

// c = a b, or c + a b, all by rows, in blocks that stay in the cache and fill vectors.
static void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                     float* c, int64_t ldc, bool add) {
    const int64_t rows = 256, columns = 128, depth = 512;
    for (int64_t i = 0; i < m; i += rows)
        for (int64_t j = 0, width; j < n; j += width) {
            width = n - j < columns + 64 ? n - j : columns;
            for (int64_t l = 0; l < k; l += depth)
                at::native::cpublas::brgemm(std::min(rows, m - i), width, std::min(depth, k - l), lda, ldb, ldc,
                                            add || l > 0, a + i * lda + l, b + l * ldb + j, c + i * ldc + j, false);
        }
}
"""
"""C++ text that the kernels need, once, after that of matrices."""

_BODY = """
        {before}
        const int64_t i0 = {rows[0]}, i1 = {rows[1]}, j0 = {columns[0]}, j1 = {columns[1]};
        {bias}
        multiply(i1 - i0, j1 - j0, {k}, {at[a]} + i0 * {step[a]}, {step[a]}, {at[b]} + j0, {step[b]},
                 {at[c]} + i0 * {step[c]} + j0, {step[c]}, {add});
        {after}
"""


@cache
def faster() -> bool:
    """Whether they are faster here than torch's: on AMD's processors with vectors of 512 bits."""
    return available() and "AuthenticAMD" in processor()


def available() -> bool:
    """Whether this torch and this processor can run them."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and exported(_BRGEMM)


def kernel(product: Product, recorder: Recorder, threads: int, name: str) -> tuple[Kernel, str]:
    """A float32 product by rows: what lies by columns is turned before, the result after."""
    product = min(product, product.turned, key=lambda p: p.moves)
    matrices = {"a": product.a, "b": product.b, "c": product.c}
    (m, n), k = (product.c.rows, product.c.columns), product.a.columns
    arguments = product.arguments()
    at, step = {letter: letter for letter in matrices}, {letter: each.step for letter, each in matrices.items()}
    for letter, each in matrices.items():
        if not each.by_rows:
            at[letter], step[letter] = f"own_{letter}", each.columns
            arguments[at[letter]] = ("float*", recorder.place(torch.empty(each.rows * each.columns)))
    before = [turned(letter, matrices[letter], at[letter]) for letter in "ab" if at[letter] != letter]
    if before:
        before.append("#pragma omp barrier")
    rows, columns = (part(m, 1), ("0", str(n))) if m > n else (("0", str(m)), part(n, 16))
    row = f"{at['c']} + i * {step['c']}"
    of_row, of_columns = f"std::fill({row} + j0, {row} + j1, bias[i])", f"std::copy(bias + j0, bias + j1, {row} + j0)"
    fill = f"for (int64_t i = i0; i < i1; ++i) {of_row if product.of_rows else of_columns};"
    to = f"c + j0 * {product.c.step} + i0, {product.c.step}"
    body = _BODY.format(
        before="\n        ".join(before),
        rows=rows,
        columns=columns,
        bias="" if product.bias is None else fill,
        k=k,
        at=at,
        step=step,
        add="false" if product.bias is None else "true",
        after="" if at["c"] == "c" else f"turn({at['c']} + i0 * {n} + j0, {n}, {to}, i1 - i0, j1 - j0);",
    )
    return written(name, arguments, body, threads if m * n * k >= SHARED else 1)
