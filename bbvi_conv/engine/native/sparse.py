"""Products with data that are mostly zeros, such as images on black or counts of words, skip what is zero.

Which products these are is read from the data: where an operand follows from data alone, and on a sample of it few of
its numbers differ from zero, the product becomes an operation of ours, and generated code makes a list of those numbers
at every step. The result is that of the dense product up to rounding, except that zero times infinity counts as zero.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from bbvi_conv.engine.native.matrices import Matrix, Product, Step, part, turned, written
from bbvi_conv.engine.native.plan import Call, Kernel, View

if TYPE_CHECKING:  # which imports the compiler
    from bbvi_conv.engine.native.recording import Recorder

DENSE = 0.25
"""Share of numbers other than zero from which skipping the others gains nothing."""

LARGE = 2**21
"""Multiplications, those with zero included, from which making lists is worth it."""

MOST = 2**24
"""Numbers in a matrix for which lists are made: they take twice its memory."""

TARGET = "bbvi_conv.sparse_product.default"
"""What such a product is recorded as."""

DEPTH = 48
"""Rows of the dense matrix in one block: with the columns of one, they stay in the innermost cache."""

HELPERS = """
#if defined(CPU_CAPABILITY_AVX2)
// For each mask of eight lanes the numbers of those that are in it, a byte each.
static constexpr auto CHOSEN = [] {
    std::array<uint64_t, 256> chosen{};
    for (uint64_t mask = 0; mask < 256; ++mask)
        for (uint64_t lane = 0, n = 0; lane < 8; ++lane)
            if (mask >> lane & 1) chosen[mask] |= lane << 8 * n++;
    return chosen;
}();
#endif

// Numbers of a (m x k) that are not zero, for rows r0 to r1: row r has its own in at and value from r * k on,
// those of its columns p * depth and more from begin[r * (blocks + 1) + p] on; at counts columns from there.
static void list_rows(const float* a, int64_t step, bool turned, int64_t k, int64_t depth, int64_t r0, int64_t r1,
                      int32_t* at, float* value, int32_t* begin, float* strip) {
    const int64_t blocks = (k + depth - 1) / depth;
    for (int64_t r = r0; r < r1; ++r) {
        const float* x = a + r * step;
        if (turned) {
            if ((r - r0) % 16 == 0) turn(a + r, step, strip, k, k, std::min<int64_t>(16, r1 - r));
            x = strip + (r - r0) % 16 * k;
        }
        int32_t* where = at + r * k;
        float* what = value + r * k;
        int64_t n = 0;
        for (int64_t p = 0; p < blocks; ++p) {
            const int64_t first = p * depth, last = std::min(k, first + depth);
            begin[r * (blocks + 1) + p] = n;
            int64_t j = first;
#if defined(CPU_CAPABILITY_AVX512)
            const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            for (; j + 16 <= last; j += 16) {  // compressed in registers: in memory it takes long on some processors
                const __m512 v = _mm512_loadu_ps(x + j);
                const __mmask16 mask = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
                const __m512i here = _mm512_add_epi32(lane, _mm512_set1_epi32(j - first));
                _mm512_storeu_ps(what + n, _mm512_maskz_compress_ps(mask, v));
                _mm512_storeu_si512(where + n, _mm512_maskz_compress_epi32(mask, here));
                n += __builtin_popcount(mask);
            }
#elif defined(CPU_CAPABILITY_AVX2)
            for (; j + 8 <= last; j += 8) {
                const __m256 v = _mm256_loadu_ps(x + j);
                const int mask = _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ));
                const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(CHOSEN[mask]));
                _mm256_storeu_ps(what + n, _mm256_permutevar8x32_ps(v, lanes));
                _mm256_storeu_si256((__m256i*)(where + n), _mm256_add_epi32(lanes, _mm256_set1_epi32(j - first)));
                n += __builtin_popcount(mask);
            }
#endif
            for (; j < last; ++j) {
                where[n] = j - first;
                what[n] = x[j];
                n += x[j] != 0;
            }
        }
        begin[r * (blocks + 1) + blocks] = n;
    }
}

// c = the sum of rows of b, each by its number, over U vectors; where `add`, plus what c is.
template <int U>
static inline void combine(const int32_t* at, const float* value, int64_t count, const float* b, int64_t step,
                           float* c, bool add) {
    using V = at::vec::Vectorized<float>;
    V sum[U];
    #pragma GCC unroll 16
    for (int u = 0; u < U; ++u) sum[u] = add ? V::loadu(c + u * V::size()) : V(0);
    for (int64_t i = 0; i < count; ++i) {
        const float* row = b + at[i] * step;
        const V x(value[i]);
        #pragma GCC unroll 16
        for (int u = 0; u < U; ++u) sum[u] = at::vec::fmadd(x, V::loadu(row + u * V::size()), sum[u]);
    }
    #pragma GCC unroll 16
    for (int u = 0; u < U; ++u) sum[u].store(c + u * V::size());
}

// The same over columns that fill no vector.
static inline void combine_few(const int32_t* at, const float* value, int64_t count, const float* b, int64_t step,
                               float* c, bool add, int64_t columns) {
    for (int64_t j = 0; j < columns; ++j) {
        float sum = add ? c[j] : 0;
        for (int64_t i = 0; i < count; ++i) sum += value[i] * b[at[i] * step + j];
        c[j] = sum;
    }
}

constexpr int64_t LANES = at::vec::Vectorized<float>::size(), MOST = LANES == 16 ? 13 : 10, GROUP = 32;

// The same over so many vectors, up to U, and what is left over.
template <int U = MOST>
static inline void combine_all(const int32_t* at, const float* value, int64_t count, const float* b, int64_t step,
                               float* c, bool add, int64_t columns) {
    const int64_t done = columns / LANES * LANES;
    if (done == U * LANES) combine<U>(at, value, count, b, step, c, add);
    else if constexpr (U > 1) return combine_all<U - 1>(at, value, count, b, step, c, add, columns);
    if (done < columns) combine_few(at, value, count, b + done, step, c + done, add, columns - done);
}

// Columns in each of as few chunks as vectors in registers allow.
static inline int64_t chunk(int64_t columns) {
    const int64_t vectors = (columns + LANES - 1) / LANES, chunks = (vectors + MOST - 1) / MOST;
    return chunks ? (vectors + chunks - 1) / chunks * LANES : 0;
}

// c = a b over columns j0 to j1, all by rows but b, where `turned`, by columns; summed in memory of the thread's own,
// since what lies beside each other's columns would be sent from core to core.
static void sparse_rows(int64_t m, int64_t k, const int32_t* at, const float* value, const int32_t* begin,
                        const float* b, int64_t ldb, bool turned, float* c, int64_t ldc, int64_t j0, int64_t j1,
                        float* sum) {
    alignas(64) float panel[DEPTH * MOST * LANES];
    const int64_t blocks = (k + DEPTH - 1) / DEPTH, width = chunk(j1 - j0);
    for (int64_t j = j0; j < j1; j += width) {
        const int64_t columns = std::min(width, j1 - j);
        for (int64_t p = 0; p < blocks; ++p) {
            const int64_t first = p * DEPTH;
            if (turned) turn(b + j * ldb + first, ldb, panel, width, columns, std::min<int64_t>(DEPTH, k - first));
            for (int64_t r = 0; r < m; ++r) {
                const int32_t* own = begin + r * (blocks + 1) + p;
                const int64_t n = r * k + own[0];
                combine_all(at + n, value + n, own[1] - own[0], turned ? panel : b + first * ldb + j,
                            turned ? width : ldb, sum + r * width, p > 0, columns);
            }
        }
        for (int64_t r = 0; r < m; ++r) std::copy_n(sum + r * width, columns, c + r * ldc + j);
    }
}

// The transpose of c = a b over rows r0 to r1 of a; b by rows, a in one block.
static void sparse_columns(int64_t n, int64_t k, const int32_t* at, const float* value, const int32_t* begin,
                           const float* b, int64_t ldb, float* c, int64_t ldc, int64_t r0, int64_t r1) {
    alignas(64) float tile[GROUP * MOST * LANES];
    const int64_t width = chunk(n);
    for (int64_t r = r0; r < r1; r += GROUP)
        for (int64_t j = 0; j < n; j += width) {
            const int64_t rows = std::min<int64_t>(GROUP, r1 - r), columns = std::min(width, n - j);
            for (int64_t i = r; i < r + rows; ++i)
                combine_all(at + i * k, value + i * k, begin[2 * i + 1], b + j, ldb,
                            tile + (i - r) * width, false, columns);
            turn(tile, width, c + j * ldc + r, ldc, rows, columns);
        }
}
""".replace("DEPTH", str(DEPTH))
"""C++ text that the kernels need, once, after that of matrices."""

_BODY = """
        {before}
        list_rows({lists});
        #pragma omp barrier
        {product};
"""


@torch.library.custom_op("bbvi_conv::sparse_product", mutates_args=())
def _sparse_product(a: Tensor, b: Tensor, turned: bool) -> Tensor:
    """``a b`` by rows, or its transpose by rows."""
    return (b.t() @ a.t() if turned else a @ b).contiguous()


@_sparse_product.register_fake
def _(a: Tensor, b: Tensor, turned: bool) -> Tensor:
    rows, columns = a.shape[0], b.shape[1]
    return a.new_empty((columns, rows) if turned else (rows, columns))


_aten: Any = torch.ops.aten
PRODUCTS = (_aten.mm.default, _aten.addmm.default)
"""Those of torch."""


def mark(graph: GraphModule, data: Mapping[int, Tensor]) -> None:
    """Let products with mostly zeros be an operation of ours; changes ``graph``.

    Args:
        graph: ATen operations.
        data: by the number of the input, what data look like there.
    """
    inputs = graph.graph.find_nodes(op="placeholder")
    known: dict[Node, Any] = {node: data[i] for i, node in enumerate(inputs) if i in data}
    follow = set(known)
    for node in graph.graph.nodes:
        if _is_pure(node) and follow.issuperset(node.all_input_nodes):
            follow.add(node)
    for node in list(graph.graph.nodes):
        if node.target in PRODUCTS and not node.kwargs and node.meta["tensor_meta"].dtype is torch.float32:
            *bias, a, b = node.args
            rows, columns = node.meta["tensor_meta"].shape
            sparse = [side in follow and _worth_it(side, known, others) for side, others in ((a, columns), (b, rows))]
            if any(sparse):
                node.replace_all_uses_with(_product(graph, node, a, b, sparse[0], bias))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _is_pure(node: Node) -> bool:
    """Whether the node's value depends on those of its inputs alone."""
    drawn = torch.Tag.nondeterministic_seeded
    return node.target is operator.getitem or (isinstance(node.target, OpOverload) and drawn not in node.target.tags)


def _value(node: Node, known: dict[Node, Any]) -> Any:
    """What the node is where its inputs are as ``known``, to which it is added; None where it cannot be told."""
    if node in known:
        return known[node]
    needed, waiting = {node}, [node]
    while waiting:
        sources = [source for source in waiting.pop().all_input_nodes if source not in known and source not in needed]
        needed.update(sources)
        waiting += sources
    values = dict(known)
    try:
        for each in node.graph.nodes:
            if each in needed:
                args, kwargs = map_arg((each.args, each.kwargs), values.__getitem__)
                values[each] = each.target(*args, **kwargs)
    except Exception:  # whatever cannot be had here, dense products can do without
        values[node] = None
    known[node] = values[node]
    return known[node]


def _worth_it(side: Node, known: dict[Node, Any], others: int) -> bool:
    """Whether the product of this matrix with so many rows or columns is large, and most of the matrix zero."""
    shape = known[side].shape if side in known else side.meta["tensor_meta"].shape
    if not LARGE / others <= shape.numel() <= MOST:
        return False
    value = _value(side, known)
    return value is not None and int(value.count_nonzero()) <= DENSE * value.numel()


def _product(graph: GraphModule, node: Node, a: Node, b: Node, first: bool, bias: Sequence[Node]) -> Node:
    """In place of ``node``: the product of ours, whose first operand is the sparse one, plus the bias."""

    def call(target: Any, *args: Any) -> Node:
        return graph.graph.call_function(target, args)

    with graph.graph.inserting_before(node):
        operands = (a, b) if first else [call(_aten.t.default, side) for side in (b, a)]
        made = call(torch.ops.bbvi_conv.sparse_product.default, *operands, not first)
        made = call(_aten.add.Tensor, made, *bias) if bias else made
    made.meta["tensor_meta"] = node.meta["tensor_meta"]
    return made


def given_place(code: Sequence[Step]) -> list[Step]:
    """Sparse products as calls that write to a place they are given, as dense ones are."""
    return [
        replace(step, kwargs={"out": step.results[0]}, results=())
        if isinstance(step, Call) and step.target == TARGET
        else step
        for step in code
    ]


def as_dense(call: Call) -> Call:
    """The same product as torch's own."""
    a, b, across = call.args
    operands = (_transposed(b), _transposed(a)) if across else (a, b)
    return Call("aten.mm.out", operands, call.kwargs, ())


def _transposed(view: View) -> View:
    return view._replace(size=view.size[::-1], stride=view.stride[::-1])


def kernel(call: Call, recorder: Recorder, threads: int, name: str) -> tuple[Kernel, str] | None:
    """Lists of the numbers of ``a`` that are not zero, row by row, and the product by these.

    None where an operand lies in memory with gaps.
    """
    first, second, across = call.args
    a, b, c = (Matrix.of(view) for view in (first, second, call.kwargs["out"]))
    if a is None or b is None or c is None or not c.by_rows:
        return None
    (m, k), n = (a.rows, a.columns), b.columns
    depth = k if across else DEPTH
    arguments = Product(a, b, c, None).arguments()

    def scratch(name: str, count: int, dtype: torch.dtype = torch.float32) -> None:
        kind = "float*" if dtype is torch.float32 else "int32_t*"
        arguments[name] = (kind, recorder.place(torch.empty(count, dtype=dtype)))

    scratch("at", m * k, torch.int32)
    scratch("value", m * k)
    scratch("begin", m * (-(-k // depth) + 1), torch.int32)
    before, at, step = "", "b", b.step
    if not a.by_rows:
        scratch("strip", threads * 16 * k)
    if not across:
        scratch("sum", threads * m * (n + 16))
    elif not b.by_rows:
        scratch("own_b", k * n)
        before, at, step = turned("b", b, "own_b"), "own_b", n
    rows, columns = part(m, 16), part(n, 16)
    strip = "nullptr" if a.by_rows else f"strip + t * {16 * k}"
    by_columns, b_by_columns = (str(not each.by_rows).lower() for each in (a, b))
    lists = f"a, {a.step}, {by_columns}, {k}, {depth}, {rows[0]}, {rows[1]}, at, value, begin, {strip}"
    if across:
        product = f"sparse_columns({n}, {k}, at, value, begin, {at}, {step}, c, {c.step}, {rows[0]}, {rows[1]})"
    else:
        product = (
            f"sparse_rows({m}, {k}, at, value, begin, b, {b.step}, {b_by_columns}, c, {c.step}, "
            f"{columns[0]}, {columns[1]}, sum + t * {m * (n + 16)})"
        )
    return written(name, arguments, _BODY.format(before=before, lists=lists, product=product), threads)
