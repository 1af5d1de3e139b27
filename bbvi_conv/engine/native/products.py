"""Products of matrices in generated code, where those of torch's library are slow.

On AMD's processors torch's MKL runs kernels for vectors of 256 bits; oneDNN, which torch brings too, writes its own for
the 512 that newer ones have, and gives them to others as ``at::native::cpublas::brgemm``: a product of blocks of
float32 matrices by rows. What lies by columns is turned before, or the product as a whole is, whichever moves fewer
numbers; the longer side of the result is shared out among the threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from bbvi_conv.engine.native.library import processor
from bbvi_conv.engine.native.plan import Call, Kernel, View
from bbvi_conv.engine.native.recording import Recorder

CALLS = ("aten.mm.out", "aten.addmm.out")
"""What torch's products are recorded as."""

SHARED = 2**20
"""Multiplications from which a product is worth sharing out among threads."""

_BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"
"""The name of that function in torch's library, by its arguments."""

HELPERS = """
#include <torch/csrc/inductor/cpp_prefix.h>
#include <ATen/native/CPUBlas.h>

// Where the i-th of `count` even parts of n begins, in whole units.
static inline int64_t part(int64_t n, int64_t count, int64_t i, int64_t unit) {
    return i == count ? n : n * i / count / unit * unit;
}

// to = from transposed; `ld` and `step` are numbers from one row to the next.
static inline void turn(const float* from, int64_t ld, float* to, int64_t step, int64_t rows, int64_t columns) {
    if (rows > 0 && columns > 0) at::vec::transpose_mxn<float>(from, ld, to, step, rows, columns);
}

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
"""C++ text that the kernels need, once."""

_KERNEL = """
static void {name}({arguments})
{{
    {parallel}
    {{
        const int64_t t = {thread};
        {before}
        const int64_t i0 = {rows[0]}, i1 = {rows[1]}, j0 = {columns[0]}, j1 = {columns[1]};
        {bias}
        multiply(i1 - i0, j1 - j0, {k}, {at[a]} + i0 * {step[a]}, {step[a]}, {at[b]} + j0, {step[b]},
                 {at[c]} + i0 * {step[c]} + j0, {step[c]}, {add});
        {after}
    }}
}}
"""


class Matrix(NamedTuple):
    """A matrix in memory; ``step`` numbers from one row to the next, or from one column to the next."""

    view: View
    rows: int
    columns: int
    step: int
    by_rows: bool

    @property
    def turned(self) -> Matrix:
        """Its transpose, in the same memory."""
        return self._replace(rows=self.columns, columns=self.rows, by_rows=not self.by_rows)

    @property
    def moves(self) -> int:
        """Numbers to be moved where it is wanted by rows."""
        return 0 if self.by_rows else self.rows * self.columns


class Product(NamedTuple):
    """``c = a b``, plus a bias of each column of it, or of each row."""

    a: Matrix
    b: Matrix
    c: Matrix
    bias: View | None
    of_rows: bool = False

    @property
    def turned(self) -> Product:
        """The same by transposes."""
        return Product(self.b.turned, self.a.turned, self.c.turned, self.bias, not self.of_rows)

    @property
    def moves(self) -> int:
        """Numbers to be moved so that all is by rows."""
        return self.a.moves + self.b.moves + self.c.moves


@cache
def faster() -> bool:
    """Whether generated products are faster here than torch's: on AMD's processors with vectors of 512 bits."""
    return available() and "AuthenticAMD" in processor()


@cache
def available() -> bool:
    """Whether this torch and this processor can run them."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return hasattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")), _BRGEMM)
    except OSError:
        return False


Step = TypeVar("Step")


def written(
    code: Sequence[Step], recorder: Recorder, threads: int, prefix: str
) -> tuple[list[Step | Kernel], list[str]]:
    """Calls of torch's float32 products as generated kernels, and their text; everything else as it is.

    Args:
        code: what a step does.
        recorder: gives memory for what is turned.
        threads: of generated code.
        prefix: of the names of the kernels.
    """
    found: list[Step | Kernel] = []
    sources: list[str] = []
    for step in code:
        product = _product(step) if isinstance(step, Call) else None
        if product is None:
            found.append(step)
            continue
        best = min(product, product.turned, key=lambda p: p.moves)
        kernel, text = _kernel(best, recorder, threads, f"{prefix}product{len(sources)}")
        found.append(kernel)
        sources.append(text)
    return found, sources


def _product(call: Call) -> Product | None:
    """The product that a call is, if it is one of float32 matrices that lie by rows or by columns."""
    scales = [value for name, value in call.kwargs.items() if name != "out"]
    if call.target not in CALLS or any(value != 1 for value in scales):
        return None
    *biases, a, b = call.args
    given = (a, b, call.kwargs["out"])
    if any(view.dtype != "float32" for view in (*given, *biases)) or any(view.stride != (1,) for view in biases):
        return None
    left, right, out = (_matrix(view) for view in given)
    if left is None or right is None or out is None:
        return None
    return Product(left, right, out, biases[0] if biases else None)


def _matrix(view: View) -> Matrix | None:
    (rows, columns), (down, across) = view.size, view.stride
    if across == 1 and down >= columns:
        return Matrix(view, rows, columns, down, by_rows=True)
    if down == 1 and across >= rows:
        return Matrix(view, rows, columns, across, by_rows=False)
    return None


def _kernel(product: Product, recorder: Recorder, threads: int, name: str) -> tuple[Kernel, str]:
    """A product by rows: what lies by columns is turned before, the result after."""
    matrices = {"a": product.a, "b": product.b, "c": product.c}
    (m, n), k = (product.c.rows, product.c.columns), product.a.columns
    arguments = {"a": ("const float*", product.a.view.place), "b": ("const float*", product.b.view.place)}
    arguments["c"] = ("float*", product.c.view.place)
    if product.bias is not None:
        arguments["bias"] = ("const float*", product.bias.place)
    at, step = {letter: letter for letter in matrices}, {letter: each.step for letter, each in matrices.items()}
    for letter, each in matrices.items():
        if not each.by_rows:
            at[letter], step[letter] = f"own_{letter}", each.columns
            arguments[at[letter]] = ("float*", recorder.place(torch.empty(each.rows * each.columns)))
    shared = threads > 1 and m * n * k >= SHARED
    before = [_turned(letter, matrices[letter], at[letter]) for letter in "ab" if at[letter] != letter]
    if before and shared:
        before.append("#pragma omp barrier")
    rows, columns = (_part(m, 1), ("0", str(n))) if m > n else (("0", str(m)), _part(n, 16))
    row = f"{at['c']} + i * {step['c']}"
    of_row, of_columns = f"std::fill({row} + j0, {row} + j1, bias[i])", f"std::copy(bias + j0, bias + j1, {row} + j0)"
    fill = f"for (int64_t i = i0; i < i1; ++i) {of_row if product.of_rows else of_columns};"
    to = f"c + j0 * {product.c.step} + i0, {product.c.step}"
    text = _KERNEL.format(
        name=name,
        arguments=", ".join(f"{kind} {argument}" for argument, (kind, _) in arguments.items()),
        parallel=f"#pragma omp parallel num_threads({threads})" if shared else "",
        thread="omp_get_thread_num(), count = omp_get_num_threads()" if shared else "0, count = 1",
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
    kinds, places = zip(*arguments.values(), strict=True)
    return Kernel(name, kinds, places), text


def _part(count: int, unit: int) -> tuple[str, str]:
    """Where a thread's part of so many begins and ends."""
    return f"part({count}, count, t, {unit})", f"part({count}, count, t + 1, {unit})"


def _turned(letter: str, matrix: Matrix, own: str) -> str:
    """A thread's part of turning a matrix that lies by columns."""
    begin, end = _part(matrix.columns, 16)
    to = f"{own} + {begin}, {matrix.columns}"
    return f"turn({letter} + {begin} * {matrix.step}, {matrix.step}, {to}, {end} - {begin}, {matrix.rows});"
