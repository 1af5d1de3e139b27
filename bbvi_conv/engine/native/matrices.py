"""Matrices in memory and their products, as the generators of code for them see them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from bbvi_conv.engine.native.plan import Kernel, Place, View

Step = TypeVar("Step")
"""Anything that a step does."""

HELPERS = """
#include <torch/csrc/inductor/cpp_prefix.h>

// Where the i-th of `count` even parts of n begins, in whole units.
static inline int64_t part(int64_t n, int64_t count, int64_t i, int64_t unit) {
    return i == count ? n : n * i / count / unit * unit;
}

// to = from transposed; `ld` and `step` are numbers from one row to the next.
static inline void turn(const float* from, int64_t ld, float* to, int64_t step, int64_t rows, int64_t columns) {
    if (rows <= 0 || columns <= 0) return;
#if defined(CPU_CAPABILITY_AVX2)  // torch has code for blocks there, and goes through the rest number by number
    const int64_t m = rows / 8 * 8, n = columns / 8 * 8;
    for (int64_t i = 0; i < m; i += 8)
        for (int64_t j = 0; j < n; j += 8)
            at::vec::transpose_mxn<float, 8, 8>(from + i * ld + j, ld, to + j * step + i, step);
    at::vec::transpose_mxn<float>(from + n, ld, to + n * step, step, m, columns - n);
    at::vec::transpose_mxn<float>(from + m * ld, ld, to + m, step, rows - m, columns);
#else
    at::vec::transpose_mxn<float>(from, ld, to, step, rows, columns);
#endif
}
"""
"""C++ text that several kernels need, once."""


class Matrix(NamedTuple):
    """A matrix in memory; ``step`` numbers from one row to the next, or from one column to the next."""

    view: View
    rows: int
    columns: int
    step: int
    by_rows: bool

    @staticmethod
    def of(view: View) -> Matrix | None:
        """The matrix, if it lies by rows or by columns."""
        (rows, columns), (down, across) = view.size, view.stride
        if across == 1 and down >= columns:
            return Matrix(view, rows, columns, down, by_rows=True)
        if down == 1 and across >= rows:
            return Matrix(view, rows, columns, across, by_rows=False)
        return None

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

    @property
    def kind(self) -> str:
        """Type of its numbers in C++."""
        return {"float32": "float", "float64": "double"}[self.c.view.dtype]

    def arguments(self) -> dict[str, tuple[str, Place]]:
        """Type and place of each pointer, ``a``, ``b``, ``c`` and, if there is one, ``bias``."""
        read = {"a": self.a.view, "b": self.b.view, **({} if self.bias is None else {"bias": self.bias})}
        found = {name: (f"const {self.kind}*", view.place) for name, view in read.items()}
        return {**found, "c": (f"{self.kind}*", self.c.view.place)}


_KERNEL = """
static void {name}({arguments})
{{
    {parallel}
    {{
        const int64_t t = {thread};
        {body}
    }}
}}
"""


def written(name: str, arguments: Mapping[str, tuple[str, Place]], body: str, threads: int) -> tuple[Kernel, str]:
    """A kernel and its text.

    Args:
        name: of the kernel.
        arguments: type and place of each pointer, by name.
        body: what every thread does; it is number ``t`` of ``count``.
        threads: how many.
    """
    text = _KERNEL.format(
        name=name,
        arguments=", ".join(f"{kind} {argument}" for argument, (kind, _) in arguments.items()),
        parallel=f"#pragma omp parallel num_threads({threads})" if threads > 1 else "",
        thread="omp_get_thread_num(), count = omp_get_num_threads()" if threads > 1 else "0, count = 1",
        body=body.strip(),
    )
    kinds, places = zip(*arguments.values(), strict=True)
    return Kernel(name, kinds, places), text


def part(count: int, unit: int) -> tuple[str, str]:
    """Where a thread's part of so many begins and ends."""
    return f"part({count}, count, t, {unit})", f"part({count}, count, t + 1, {unit})"


def turned(letter: str, matrix: Matrix, own: str) -> str:
    """A thread's part of turning a matrix that lies by columns."""
    begin, end = part(matrix.columns, 16)
    to = f"{own} + {begin}, {matrix.columns}"
    return f"turn({letter} + {begin} * {matrix.step}, {matrix.step}, {to}, {end} - {begin}, {matrix.rows});"


@cache
def exported(name: str) -> bool:
    """Whether torch's library offers a function of that name to generated code."""
    try:
        return hasattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")), name)
    except OSError:
        return False
