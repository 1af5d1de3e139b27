"""The kernel behind :func:`bbvi_conv.engine.tensor_cores.products_of_parts`; importing this needs Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bbvi_conv.engine.tensor_cores import COLUMNS, DEPTH, blocks

WARPS, STAGES = 4, 3


def launch(products: Sequence[tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor]]) -> None:
    """Write partial sums of one or two products ``(a, b, out, sums)``; of rows of ``a`` where ``sums`` has room."""
    programs, given, kinds = zip(*(_described(*product) for product in products), strict=True)
    compiled_for = (*kinds[0], *kinds[-1], len(products) == 2, COLUMNS, DEPTH)
    _products[(sum(programs),)](*given[0], *given[-1], programs[0], *compiled_for, num_warps=WARPS, num_stages=STAGES)


def _described(
    a: Sequence[Tensor], b: Sequence[Tensor], out: Tensor, sums: Tensor
) -> tuple[int, list[Any], tuple[Any, ...]]:
    """Programs of a product, what they are given, and what they are compiled for."""
    (m, k), n = a[0].shape, b[0].shape[1]
    division = blocks(m, n, k)
    programs = triton.cdiv(n, COLUMNS) * triton.cdiv(m, division.rows) * division.parts
    three = [[*parts, *parts[:1] * (3 - len(parts))] for parts in (list(a), list(b))]
    given = [*three[0], *three[1], out, sums, m, n, k, *a[0].stride(), *b[0].stride(), division.length]
    return programs, given, (len(a), len(b), sums.numel() > 0, division.rows)


@triton.jit
def _sum(
    a1, a2, a3, b1, b2, b3, i, j, m, n, begin, end, a_row, a_column, b_row, b_column,
    a_parts: tl.constexpr, b_parts: tl.constexpr, with_sums: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Sums over ``begin .. end`` of the products of one block, and of its rows of ``a``."""
    inner = begin + tl.arange(0, depth)
    from_a = i[:, None] * a_row + inner[None, :] * a_column
    from_b = inner[:, None] * b_row + j[None, :] * b_column
    total = tl.zeros((rows, columns), dtype=tl.float32)
    row = tl.zeros((rows, depth if with_sums else 1), dtype=tl.float32)
    for at in range(begin, end, depth):
        there = tl.arange(0, depth) < end - at
        seen_a = (i < m)[:, None] & there[None, :]
        seen_b = there[:, None] & (j < n)[None, :]
        x1 = tl.load(a1 + from_a, mask=seen_a, other=0.0)
        y1 = tl.load(b1 + from_b, mask=seen_b, other=0.0)
        if a_parts >= 2:
            x2 = tl.load(a2 + from_a, mask=seen_a, other=0.0)
        if b_parts >= 2:
            y2 = tl.load(b2 + from_b, mask=seen_b, other=0.0)
        # tensor cores cut sums off: small ones first, and to the sum of blocks by units that round
        near = tl.zeros((rows, columns), dtype=tl.float32)
        if a_parts == 3:
            x3 = tl.load(a3 + from_a, mask=seen_a, other=0.0)
            near = tl.dot(x3, y1, near)
        if b_parts == 3:
            y3 = tl.load(b3 + from_b, mask=seen_b, other=0.0)
            near = tl.dot(x1, y3, near)
        if a_parts == 3 and b_parts == 3:
            near = tl.dot(x2, y2, near)
        if a_parts >= 2:
            near = tl.dot(x2, y1, near)
        if b_parts >= 2:
            near = tl.dot(x1, y2, near)
        total += tl.dot(x1, y1, near)
        if with_sums:
            row += x1.to(tl.float32)
            if a_parts >= 2:
                row += x2.to(tl.float32)
            if a_parts == 3:
                row += x3.to(tl.float32)
        from_a += depth * a_column
        from_b += depth * b_row
    return total, tl.sum(row, axis=1)


@triton.jit
def _product(
    program, a1, a2, a3, b1, b2, b3, out, sums, m, n, k, a_row, a_column, b_row, b_column, length,
    a_parts: tl.constexpr, b_parts: tl.constexpr, with_sums: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """One block of one part of the sum; the first of a row, with sums, adds up its rows of ``a`` as well."""
    across, down = tl.cdiv(n, columns), tl.cdiv(m, rows)
    block, part = program % across, program // (across * down)
    i = program // across % down * rows + tl.arange(0, rows)
    j = block * columns + tl.arange(0, columns)
    begin = part * length
    end = tl.minimum(begin + length, k)
    if with_sums and block == 0:
        total, row = _sum(
            a1, a2, a3, b1, b2, b3, i, j, m, n, begin, end, a_row, a_column, b_row, b_column,
            a_parts, b_parts, True, rows, columns, depth,
        )  # fmt: skip
        tl.store(sums + part * m + i, row, mask=i < m)
    else:
        total, row = _sum(
            a1, a2, a3, b1, b2, b3, i, j, m, n, begin, end, a_row, a_column, b_row, b_column,
            a_parts, b_parts, False, rows, columns, depth,
        )  # fmt: skip
    place = out + part * m * n + i[:, None] * n + j[None, :]
    tl.store(place, total, mask=(i < m)[:, None] & (j < n)[None, :])


@triton.jit
def _products(
    a1, a2, a3, b1, b2, b3, ab, a_sums, m, n, k, a_row, a_column, b_row, b_column, length,
    c1, c2, c3, d1, d2, d3, cd, c_sums, p, q, r, c_row, c_column, d_row, d_column, other_length, programs,
    a_parts: tl.constexpr, b_parts: tl.constexpr, a_summed: tl.constexpr, rows: tl.constexpr,
    c_parts: tl.constexpr, d_parts: tl.constexpr, c_summed: tl.constexpr, other_rows: tl.constexpr,
    paired: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """A program of the first product; in a pair, those after its last are of the second."""
    program = tl.program_id(0)
    if paired and program >= programs:
        _product(
            program - programs, c1, c2, c3, d1, d2, d3, cd, c_sums, p, q, r, c_row, c_column, d_row, d_column,
            other_length, c_parts, d_parts, c_summed, other_rows, columns, depth,
        )  # fmt: skip
    else:
        _product(
            program, a1, a2, a3, b1, b2, b3, ab, a_sums, m, n, k, a_row, a_column, b_row, b_column, length,
            a_parts, b_parts, a_summed, rows, columns, depth,
        )  # fmt: skip
