r"""Products of float32 matrices by the units of Intel's processors for tiles of bfloat16 numbers (AMX).

A float32 number is the sum of three of bfloat16, :math:`x = x_1 + x_2 + x_3`, each what the ones before leave over; all
24 bits are kept. Of the nine products of the parts of two numbers the six largest make

.. math:: x y \approx x_1 y_1 + (x_1 y_2 + x_2 y_1) + (x_2 y_2 + x_1 y_3 + x_3 y_1),

which leaves out :math:`2^{-24} |x y|` at most, as much as rounding the product does; sums are of float32. Tile units do
16 times as many products as vector units in the same time, so that six of them are still quicker than one.

Numbers below :math:`2^{-126}`, and what is left over of those below :math:`2^{-110}`, count as zero; infinite ones, and
the largest finite ones, which would be rounded to infinity, make a result that is not a number.
"""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from typing import TYPE_CHECKING

import torch

from bbvi_conv.engine.native.library import compiler, processor
from bbvi_conv.engine.native.matrices import Product, part, written
from bbvi_conv.engine.native.plan import Kernel

if TYPE_CHECKING:  # which imports the compiler
    from bbvi_conv.engine.native.recording import Recorder

LARGE = 2**22
"""Multiplications from which a product is worth splitting its operands."""

LEAST = 32
"""Rows, columns, and numbers in a sum from which tiles are not mostly empty."""

DEPTH = 4
"""Tiles that follow each other in a sum before others are: those of two rows of tiles stay in the innermost cache."""

_REQUEST, _TILE_DATA, _SYSCALL = 0x1023, 18, 158
"""Linux lends the registers of tiles to a process that asks for them: ``arch_prctl(ARCH_REQ_XCOMP_PERM, ...)``."""

HELPERS = """
#include <immintrin.h>

// All eight tiles have 16 rows of 64 bytes.
static inline void tiles_begin() {
    struct alignas(64) { uint8_t palette = 1, other[15] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } sizes;
    for (int i = 0; i < 8; ++i) { sizes.bytes[i] = 64; sizes.rows[i] = 16; }
    _tile_loadconfig(&sizes);
}

// The parts of two vectors, rounded to 16 bits: the first halves of what is in part sum to a, the others to b.
static inline void split(__m512 a, __m512 b, __m512i* part, int64_t step) {
    const __m512i half = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(0xffff0000);
    #pragma GCC unroll 3
    for (int p = 0; p < 3; ++p) {
        const __m512i x = _mm512_add_epi32(_mm512_castps_si512(a), half);
        const __m512i y = _mm512_add_epi32(_mm512_castps_si512(b), half);
        part[p * step] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(x, 16), y, high, 0xF8);  // x | y & high
        a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_and_si512(x, high)));
        b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(y, high)));
    }
}

static inline __mmask16 first(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

// Tile i, of 16 of n, and its blocks q0 to q1, of 32 of k, of a matrix; three parts of each. `along`: what follows each
// other in memory is of one i. Numbers k and k + 16 of a block make a pair. A tile holds the pairs of an i side by
// side, or `across`, those of all i.
static inline void pack(const float* x, int64_t step, bool along, bool across, int64_t n, int64_t k, int64_t i,
                        int64_t q0, int64_t q1, uint32_t* to) {
    alignas(64) __m512i own[48];
    const bool turned = along == across;
    for (int64_t q = q0; q < q1; ++q, to += 768) {
        __m512i* rows = turned ? own : (__m512i*)to;
        for (int64_t r = 0; r < 16; ++r) {
            __m512 a = _mm512_setzero_ps(), b = a;
            if (along) {
                const float* from = x + (i * 16 + r) * step + q * 32;
                if (i * 16 + r < n) {
                    a = _mm512_maskz_loadu_ps(first(k - q * 32), from);
                    b = _mm512_maskz_loadu_ps(first(k - q * 32 - 16), from + 16);
                }
            } else {
                const float* from = x + (q * 32 + r) * step + i * 16;
                if (q * 32 + r < k) a = _mm512_maskz_loadu_ps(first(n - i * 16), from);
                if (q * 32 + 16 + r < k) b = _mm512_maskz_loadu_ps(first(n - i * 16), from + 16 * step);
            }
            split(a, b, rows + r, 16);
        }
        if (turned)
            for (int p = 0; p < 3; ++p) turn((float*)(own + 16 * p), 16, (float*)(to + 256 * p), 16, 16, 16);
    }
}

// Four tiles of sums, of two tiles of a and two of b, each of so many blocks; the first parts of a come last.
static inline void add_four(const uint32_t* a, const uint32_t* b, int64_t blocks, bool begin, float* sums) {
    const int64_t next = blocks * 768;
    if (begin) { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }
    else { _tile_loadd(0, sums, 64); _tile_loadd(1, sums + 256, 64); _tile_loadd(2, sums + 512, 64);
           _tile_loadd(3, sums + 768, 64); }
#define OF_A(p) _tile_loadd(4, a + 256 * p, 64); _tile_loadd(5, a + next + 256 * p, 64);
#define OF_B(p) _tile_loadd(6, b + 256 * p, 64); _tile_loadd(7, b + next + 256 * p, 64);
#define ADD _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    for (int64_t q = 0; q < blocks; ++q, a += 768, b += 768) {
        OF_A(2) OF_B(0) ADD OF_A(1) ADD OF_B(1) ADD OF_A(0) ADD OF_B(2) ADD OF_B(0) ADD
    }
#undef OF_A
#undef OF_B
#undef ADD
    _tile_stored(0, sums, 64); _tile_stored(1, sums + 256, 64); _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

// A tile of sums to c, plus a bias of each column or of each row, where c has such rows and columns.
static inline void write(float* sums, const float* bias, bool of_rows, float* c, int64_t ldc, bool by_rows, int64_t m,
                         int64_t n, int64_t i, int64_t j) {
    const int64_t rows = std::min<int64_t>(16, m - i), columns = std::min<int64_t>(16, n - j);
    if (rows <= 0 || columns <= 0) return;
    const __mmask16 mask = first(columns);
    for (int64_t r = 0; bias && r < rows; ++r) {
        const __m512 more = of_rows ? _mm512_set1_ps(bias[i + r]) : _mm512_maskz_loadu_ps(mask, bias + j);
        _mm512_store_ps(sums + 16 * r, _mm512_add_ps(_mm512_load_ps(sums + 16 * r), more));
    }
    if (by_rows)
        for (int64_t r = 0; r < rows; ++r)
            _mm512_mask_storeu_ps(c + (i + r) * ldc + j, mask, _mm512_load_ps(sums + 16 * r));
    else
        turn(sums, 16, c + j * ldc + i, ldc, rows, columns);
}

// c = a b over rows i0 to i1 and columns j0 to j1, which begin with a pair of tiles; `a_along`: a lies by rows,
// `b_along`: b lies by columns. own: memory for a chunk of b, and sums: for those of all its pairs of tiles.
static void multiply_tiles(const float* a, int64_t lda, bool a_along, const float* b, int64_t ldb, bool b_along,
                           const float* bias, bool of_rows, float* c, int64_t ldc, bool by_rows,
                           int64_t m, int64_t n, int64_t k, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                           uint32_t* own, float* sums) {
    if (i0 >= i1 || j0 >= j1) return;
    alignas(64) uint32_t chunk[2 * DEPTH * 768];
    alignas(64) float one[1024];
    tiles_begin();
    const int64_t blocks = (k + 31) / 32, pairs = (j1 - j0 + 31) / 32;
    for (int64_t q = 0; q < blocks; q += DEPTH) {
        const int64_t end = std::min<int64_t>(blocks, q + DEPTH), size = (end - q) * 768;
        for (int64_t j = 0; j < 2 * pairs; ++j) pack(b, ldb, b_along, true, n, k, j0 / 16 + j, q, end, own + j * size);
        for (int64_t i = i0; i < i1; i += 32) {
            for (int64_t u = 0; u < 2; ++u) pack(a, lda, a_along, false, m, k, i / 16 + u, q, end, chunk + u * size);
            for (int64_t j = 0; j < pairs; ++j) {
                float* four = blocks > DEPTH ? sums + ((i - i0) / 32 * pairs + j) * 1024 : one;
                add_four(chunk, own + 2 * j * size, end - q, q == 0, four);
                for (int64_t v = 0; end == blocks && v < 4; ++v)
                    write(four + 256 * v, bias, of_rows, c, ldc, by_rows, m, n, i + v / 2 * 16,
                          j0 + j * 32 + v % 2 * 16);
            }
        }
    }
    _tile_release();
}
""".replace("DEPTH", str(DEPTH))
"""C++ text that the kernels need, once, after that of matrices."""

_BODY = """
        multiply_tiles(a, {a.step}, {along_a}, b, {b.step}, {along_b}, {bias}, {of_rows}, c, {c.step}, {by_rows},
                       {m}, {n}, {k}, {rows[0]}, {rows[1]}, {columns[0]}, {columns[1]},
                       own + t * {own}, sums + t * {sums});
"""


@cache
def faster() -> bool:
    """Whether this processor has tiles, the system lends them, and the compiler knows them."""
    if not {"amx_tile", "amx_bf16"} <= set(processor().split()) or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return _compiles() and _lent()


def _compiles() -> bool:
    command = [compiler(), "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"]
    known = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return "__AMX_BF16__" in known and "__AMX_TILE__" in known


def _lent() -> bool:
    """Ask for the registers, for the whole process; only Linux names a processor's tiles, so Linux it is."""
    return bool(ctypes.CDLL(None).syscall(_SYSCALL, _REQUEST, _TILE_DATA) == 0)


def fits(product: Product) -> bool:
    """Whether a product is one of large float32 matrices."""
    sizes = (product.c.rows, product.c.columns, product.a.columns)
    large = min(sizes) >= LEAST and sizes[0] * sizes[1] * sizes[2] >= LARGE
    return large and product.c.view.dtype == "float32"


def kernel(product: Product, recorder: Recorder, threads: int, name: str) -> tuple[Kernel, str]:
    """A product, or its transpose: whichever turns less. Threads share its longer side, and split what they need."""
    a, b, c, bias, of_rows = product = min(product, product.turned, key=_turns)
    m, n, k = c.rows, c.columns, a.columns
    pairs, deep = -(-n // 32), k > 32 * DEPTH
    own, sums = 2 * pairs * DEPTH * 768, -(-m // 32) * pairs * 1024 if deep else 0
    arguments = {
        **product.arguments(),
        "own": ("uint32_t*", recorder.place(torch.empty(threads * own, dtype=torch.int32))),
        "sums": ("float*", recorder.place(torch.empty(max(1, threads * sums)))),
    }
    body = _BODY.format(
        **{"a": a, "b": b, "c": c, "m": m, "n": n, "k": k},
        along_a=str(a.by_rows).lower(),
        along_b=str(not b.by_rows).lower(),
        by_rows=str(c.by_rows).lower(),
        of_rows=str(of_rows).lower(),
        bias="nullptr" if bias is None else "bias",
        rows=part(m, 32) if m >= n else ("0", str(m)),
        columns=("0", str(n)) if m >= n else part(n, 32),
        own=own,
        sums=sums,
    )
    return written(name, arguments, body, threads)


def _turns(product: Product) -> float:
    """Numbers to be turned: of an operand three parts of half the size, or the result."""
    a, b, c, *_ = product
    return 1.5 * (a.moves + b.moves) + c.moves
