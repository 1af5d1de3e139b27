r"""Vectors in generated loops, where torch's own are slow: exponentials, and bytes that become numbers.

An exponential is computed inside the loop that needs it, not by a call of torch's library, which would spill every
vector register: what a loop keeps in them would be loaded anew for each vector.

.. math:: e^x = 2^n e^r, \qquad n = \operatorname{round}(x / \ln 2), \quad |r| \le \tfrac12 \ln 2, \qquad
   e^r \approx 1 + r + r^2 q(r)

with q of degree 4, whose worst relative error, by reweighted least squares, is 3 times :math:`10^{-9}`.

With vectors of 256 bits, eight bytes go from memory to a register at once, not by way of other memory, which is read
before the processor has it ready.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_EXP = re.compile(r"\b(tmp\d+(?:\.neg\(\))?)\.exp\(\)")

_EIGHT_BYTES = re.compile(r"(Vectorized<u?int8_t>::loadu)(\(.*), static_cast<int64_t>\(8\)\)")

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

_RULES = {
    512: [(_EXP, r"exponential(\1)")],
    256: [(_EXP, r"exponential(\1)"), (_EIGHT_BYTES, r"\1_one_fourth\2)")],
}
"""What is replaced, and by what."""


def mended(sources: Sequence[str], bits: int) -> tuple[str, ...]:
    """Texts of kernels with all that done so, after what they then need; ``bits`` are those of a vector."""
    made = tuple(sources)
    for pattern, text in _RULES.get(bits, ()):
        made = tuple(pattern.sub(text, source) for source in made)
    return made if made == tuple(sources) else (HEADERS[bits], *made)
