r"""The exponential of a vector of float32 numbers inside the loop that needs it, not by a call of torch's library.

.. math:: e^x = 2^n e^r, \qquad n = \operatorname{round}(x / \ln 2), \quad |r| \le \tfrac12 \ln 2, \qquad
   e^r \approx 1 + r + r^2 q(r)

with q of degree 4, whose worst relative error, by reweighted least squares, is 3 times :math:`10^{-9}`. A call would
spill every vector register, and what a loop keeps in them would be loaded anew for each vector.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

CALL = re.compile(r"\b(tmp\d+(?:\.neg\(\))?)\.exp\(\)")

_HEADER = """
#include <torch/csrc/inductor/cpp_prefix.h>

template <typename T>
static inline T exponential(const T& x) { return x.exp(); }

// Below -105 it is zero, above 89 infinite; max and min give their second operand where one is not a number.
static inline at::vec::Vectorized<float> exponential(const at::vec::Vectorized<float>& given) {
    const auto constant = [](float value) { return _mm512_set1_ps(value); };
    const __m512 x = _mm512_max_ps(constant(-105.0f), _mm512_min_ps(constant(89.0f), given));
    const __m512 n = ROUND(_mm512_mul_ps(x, constant(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, constant(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, constant(-2.12194440e-4f), r);
    __m512 q = _mm512_fmadd_ps(constant(0.0013814598553496882f), r, constant(0.008368716879673669f));
    q = _mm512_fmadd_ps(q, r, constant(0.04166838804717757f));
    q = _mm512_fmadd_ps(q, r, constant(0.16666520631709733f));
    q = _mm512_fmadd_ps(q, r, constant(0.4999999344778737f));
    const __m512 e = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), q, r), constant(1.0f));
SCALE}
"""

_BY_HALVES = """\
    // the power of two by halves, each of which has an exponent of its own: together they may be subnormal or infinite
    const auto power = [](__m256i k) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23));
    };
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(e, power(half)), power(_mm256_sub_epi32(whole, half)));
"""

HEADERS = {
    512: _HEADER.replace("ROUND", "_mm512_roundscale_ps").replace("SCALE", "    return _mm512_scalef_ps(e, n);\n"),
    256: _HEADER.replace("ROUND", "_mm256_round_ps").replace("SCALE", _BY_HALVES).replace("m512", "m256"),
}
"""By the bits of a vector."""


def inlined(sources: Sequence[str], bits: int) -> tuple[str, ...]:
    """Texts of kernels with such calls replaced, after what they then need; ``bits`` are those of a vector."""
    if bits not in HEADERS or not any(map(CALL.search, sources)):
        return tuple(sources)
    return (HEADERS[bits], *(CALL.sub(r"exponential(\1)", text) for text in sources))
