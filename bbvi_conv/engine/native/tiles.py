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

NEAR = 2**19
"""Bytes of parts of a matrix that stay in the second cache: if so few are all, all tiles of a sum follow each other."""

_REQUEST, _TILE_DATA, _SYSCALL = 0x1023, 18, 158
"""Linux lends the registers of tiles to a process that asks for them: ``arch_prctl(ARCH_REQ_XCOMP_PERM, ...)``."""

HELPERS = """
#include <cstdlib>
#include <memory>
#include <immintrin.h>

// All eight tiles have 16 rows of 64 bytes.
struct alignas(64) Sizes {
    uint8_t palette = 1, other[15] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static const Sizes sizes;

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

// One block of 32 of k of a tile of 16 of n, to be taken apart row by row.
struct Block {
    const float* from;
    int64_t step, other, low, high;  // from a row to the next, and to its other half; rows of either that there are
    __mmask16 low_mask, high_mask;
    uint32_t* to;
    bool turned;
    alignas(64) __m512i own[48], v[16];  // what is turned

    void row(int64_t r) {
        split(_mm512_maskz_loadu_ps(r < low ? low_mask : 0, from + r * step),
              _mm512_maskz_loadu_ps(r < high ? high_mask : 0, from + r * step + other),
              (turned ? own : (__m512i*)to) + r, 16);
    }

    // A quarter of the work to transpose a part.
    template <int part, int quarter> void turn() {
        constexpr int apart = 1 << quarter;
        __m512i* from = quarter == 0 ? own + 16 * part : v;
        __m512i w[16];
        #pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const int at = i / apart * 2 * apart + i % apart, into = quarter == 1 ? i / 2 * 4 + i % 2 * 2 : at;
            const __m512i x = from[at], y = from[at + apart];
            if constexpr (quarter == 0) {
                w[into] = _mm512_unpacklo_epi32(x, y);
                w[into + 1] = _mm512_unpackhi_epi32(x, y);
            } else if constexpr (quarter == 1) {
                w[into] = _mm512_unpacklo_epi64(x, y);
                w[into + 1] = _mm512_unpackhi_epi64(x, y);
            } else {
                w[into] = _mm512_shuffle_i32x4(x, y, 0x88);
                w[into + apart] = _mm512_shuffle_i32x4(x, y, 0xdd);
            }
        }
        #pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) (quarter == 3 ? (__m512i*)to + 16 * part : v)[i] = w[i];
    }

    template <int part> void turn() { turn<part, 0>(); turn<part, 1>(); turn<part, 2>(); turn<part, 3>(); }
};

// Tiles of a matrix whose numbers are taken apart one block after the other: tiles of 16 of n, from the one numbered
// `tile` on, and of each so many blocks of 32 of k, from the one numbered `block` on, three parts of each. `along`:
// what follows each other in memory is of one of n. Numbers k and k + 16 of a block make a pair. A tile holds the pairs
// of one of n side by side, or `across`, those of all.
struct Parts {
    const float* x;
    int64_t step;
    bool along, across;
    int64_t n, k, tile, block, blocks;
    uint32_t* to;
    int64_t left, done = 0;

    // The next block.
    void begin(Block& next) {
        const int64_t i = (tile + done / blocks) * 16, q = (block + done % blocks) * 32;
        next.from = along ? x + i * step + q : x + q * step + i;
        next.step = step;
        next.other = along ? 16 : 16 * step;
        next.low = along ? n - i : k - q;
        next.high = along ? n - i : k - q - 16;
        next.low_mask = first(along ? k - q : n - i);
        next.high_mask = first(along ? k - q - 16 : n - i);
        next.to = to + 768 * done;
        next.turned = along == across;
        ++done;
        --left;
    }

    void take() {
        Block next;
        begin(next);
        #pragma GCC unroll 4
        for (int64_t r = 0; r < 16; ++r) next.row(r);
        if (next.turned) { next.turn<0>(); next.turn<1>(); next.turn<2>(); }
    }

    void take_until(int64_t count) { while (done < count) take(); }
};

// Four tiles of sums, of two tiles of a and two of b, each of so many blocks; the first parts of a come last. Meanwhile
// what is needed next is taken apart: a little after every instruction of tiles, for the processor looks no further
// ahead while one of them waits.
static inline void add_four(const uint32_t* a, const uint32_t* b, int64_t blocks, bool begin, float* sums,
                            Parts& now, Parts& soon, Parts& later) {
    const int64_t next = blocks * 768;
    if (begin) { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }
    else { _tile_loadd(0, sums, 64); _tile_loadd(1, sums + 256, 64); _tile_loadd(2, sums + 512, 64);
           _tile_loadd(3, sums + 768, 64); }
#define OF_A(p) _tile_loadd(4, a + 256 * p, 64); _tile_loadd(5, a + next + 256 * p, 64);
#define OF_B(p) _tile_loadd(6, b + 256 * p, 64); _tile_loadd(7, b + next + 256 * p, 64);
#define ADD(w, x, y, z) _tile_dpbf16ps(0, 4, 6); w; _tile_dpbf16ps(1, 4, 7); x; \\
                        _tile_dpbf16ps(2, 5, 6); y; _tile_dpbf16ps(3, 5, 7); z;
#define R(r) at.row(r)
#define T(p, q) at.turn<p, q>()
    Block at;
    for (int64_t q = 0; q < blocks; ++q, a += 768, b += 768) {
        asm volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
        Parts& more = now.left ? now : soon.left ? soon : later;
        if (more.left) more.begin(at);
        else {
            OF_A(2) OF_B(0) ADD(,,,) OF_A(1) ADD(,,,) OF_B(1) ADD(,,,)
            OF_A(0) ADD(,,,) OF_B(2) ADD(,,,) OF_B(0) ADD(,,,)
            continue;
        }
        if (at.turned) {
            OF_A(2) OF_B(0) ADD(R(0), R(1), R(2), R(3)) OF_A(1) ADD(R(4), R(5), R(6), R(7))
            OF_B(1) ADD(R(8), R(9), R(10), R(11)) OF_A(0) ADD(R(12); R(13), R(14); R(15), T(0, 0), T(0, 1))
            OF_B(2) ADD(T(0, 2), T(0, 3), T(1, 0), T(1, 1))
            OF_B(0) ADD(T(1, 2), T(1, 3), T(2, 0); T(2, 1), T(2, 2); T(2, 3))
        } else {
            OF_A(2) OF_B(0) ADD(R(0), R(1), R(2),) OF_A(1) ADD(R(3), R(4), R(5),) OF_B(1) ADD(R(6), R(7), R(8),)
            OF_A(0) ADD(R(9), R(10), R(11),) OF_B(2) ADD(R(12), R(13),,) OF_B(0) ADD(R(14), R(15),,)
        }
    }
#undef OF_A
#undef OF_B
#undef ADD
#undef R
#undef T
    _tile_stored(0, sums, 64); _tile_stored(1, sums + 256, 64); _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

// Memory of a thread's own for so many numbers, the same for every product: what it holds is still in the cache.
static inline uint32_t* own_memory(int64_t count) {
    static thread_local std::unique_ptr<uint32_t, decltype(&std::free)> memory{nullptr, std::free};
    static thread_local int64_t size = 0;
    if (size < count) {
        memory.reset((uint32_t*)std::aligned_alloc(64, (4 * count + 63) / 64 * 64));
        size = count;
    }
    return memory.get();
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
// `b_along`: b lies by columns. k is gone through in chunks of so many blocks. A thread's memory holds two chunks of a
// pair of tiles of a and of all of b, and the sums of all pairs, if there is more than one chunk.
static void multiply_tiles(const float* a, int64_t lda, bool a_along, const float* b, int64_t ldb, bool b_along,
                           const float* bias, bool of_rows, float* c, int64_t ldc, bool by_rows, int64_t m, int64_t n,
                           int64_t k, int64_t depth, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    if (i0 >= i1 || j0 >= j1) return;
    alignas(64) float one[1024];
    _tile_loadconfig(&sizes);
    const int64_t blocks = (k + 31) / 32, pairs = (j1 - j0 + 31) / 32, size = 2 * depth * 768;
    const int64_t taken = (2 + (blocks > depth ? 2 : 1) * pairs) * size;
    uint32_t* own = own_memory(taken + (blocks > depth ? (i1 - i0 + 31) / 32 * pairs * 1024 : 0));
    float* sums = (float*)(own + taken);
    const auto of_a = [&](int64_t q, int64_t i, int64_t turn) {
        const int64_t deep = std::max<int64_t>(0, std::min(depth, blocks - q));
        return Parts{a, lda, a_along, false, m, k, i / 16, q, deep, own + turn % 2 * size, 2 * deep};
    };
    const auto of_b = [&](int64_t q) {
        const int64_t deep = std::max<int64_t>(0, std::min(depth, blocks - q));
        return Parts{b, ldb, b_along, true, n, k, j0 / 16, q, deep, own + (2 + q / depth % 2 * pairs) * size,
                     2 * pairs * deep};
    };
    int64_t turn = 0;
    Parts now = of_b(0), soon = of_a(0, i0, turn);
    for (int64_t q = 0; q < blocks; q += depth) {
        const int64_t end = std::min(blocks, q + depth), deep = end - q;
        Parts later = of_b(end);
        for (int64_t i = i0; i < i1; i += 32) {
            soon.take_until(2 * deep);
            const uint32_t* rows_of_a = soon.to;
            soon = i + 32 < i1 ? of_a(q, i + 32, ++turn) : of_a(end, i0, ++turn);
            for (int64_t j = 0; j < pairs; ++j) {
                now.take_until(2 * (j + 1) * deep);
                float* four = blocks > depth ? sums + ((i - i0) / 32 * pairs + j) * 1024 : one;
                add_four(rows_of_a, now.to + 2 * j * deep * 768, deep, q == 0, four, now, soon, later);
                for (int64_t v = 0; end == blocks && v < 4; ++v)
                    write(four + 256 * v, bias, of_rows, c, ldc, by_rows, m, n, i + v / 2 * 16,
                          j0 + j * 32 + v % 2 * 16);
            }
        }
        now = later;
    }
    _tile_release();
}
"""
"""C++ text that the kernels need, once, after that of matrices."""

_BODY = """
        multiply_tiles(a, {a.step}, {along_a}, b, {b.step}, {along_b}, {bias}, {of_rows}, c, {c.step}, {by_rows},
                       {m}, {n}, {k}, {depth}, {rows[0]}, {rows[1]}, {columns[0]}, {columns[1]});
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
    blocks = -(-k // 32)
    depth = blocks if 6144 * blocks * -(-n // (32 if m >= n else 32 * threads)) <= NEAR else DEPTH
    body = _BODY.format(
        **{"a": a, "b": b, "c": c, "m": m, "n": n, "k": k, "depth": depth},
        along_a=str(a.by_rows).lower(),
        along_b=str(not b.by_rows).lower(),
        by_rows=str(c.by_rows).lower(),
        of_rows=str(of_rows).lower(),
        bias="nullptr" if bias is None else "bias",
        rows=part(m, 32) if m >= n else ("0", str(m)),
        columns=("0", str(n)) if m >= n else part(n, 32),
    )
    return written(name, product.arguments(), body, threads)


def _turns(product: Product) -> float:
    """Numbers to be turned: of an operand three parts of half the size, or the result."""
    a, b, c, *_ = product
    return 1.5 * (a.moves + b.moves) + c.moves
