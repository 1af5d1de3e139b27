"""Products of matrices in generated code, without a call of torch's operations for each.

With data that are mostly zeros they are :mod:`sparse`; on some processors they are made of :mod:`tiles` or of
:mod:`blocks`; else they are :mod:`routines` of the library that torch calls. What is none of these stays a call of
torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bbvi_conv.engine.native import blocks, matrices, routines, sparse, tiles
from bbvi_conv.engine.native.matrices import Matrix, Product, Step
from bbvi_conv.engine.native.plan import Call, Kernel

if TYPE_CHECKING:  # which imports the compiler
    from bbvi_conv.engine.native.recording import Recorder

_TORCHS = ("aten.mm.out", "aten.addmm.out")

CALLS = (*_TORCHS, sparse.TARGET)
"""What products are recorded as."""


def makers() -> tuple[bool, ...]:
    """Who can make products here, in this process: what generated code depends on beside the graph."""
    return tiles.faster(), blocks.faster(), routines.available()


def written(
    code: Sequence[Step], recorder: Recorder, threads: int, prefix: str
) -> tuple[list[Step | Kernel | Call], list[str]]:
    """Products as generated kernels, and the text of these, what they need first; everything else as it is.

    Args:
        code: what a step does.
        recorder: gives memory for what a product needs.
        threads: of generated code.
        prefix: of the names of the kernels.
    """
    found: list[Step | Kernel | Call] = []
    texts: dict[str, None] = {}  # each once
    for number, step in enumerate(code):
        if isinstance(step, Call):
            made, sources = _made(step, recorder, threads, f"{prefix}product{number}")
            found.append(made)
            texts |= dict.fromkeys(sources)
        else:
            found.append(step)
    return found, list(texts)


def _made(call: Call, recorder: Recorder, threads: int, name: str) -> tuple[Kernel | Call, list[str]]:
    """A kernel in place of a call, and its text after what that needs; or the call that stays."""
    if call.target == sparse.TARGET:
        kernel = sparse.kernel(call, recorder, threads, name)
        if kernel is not None:
            return kernel[0], [matrices.HELPERS, sparse.HELPERS, kernel[1]]
        call = sparse.as_dense(call)
    product = _product(call)
    if product is None:
        return call, []
    if tiles.faster() and tiles.fits(product):
        made, text = tiles.kernel(product, recorder, threads, name)
        return made, [matrices.HELPERS, tiles.HELPERS, text]
    if blocks.faster() and product.c.view.dtype == "float32":
        made, text = blocks.kernel(product, recorder, threads, name)
        return made, [matrices.HELPERS, blocks.HELPERS, text]
    if routines.available():
        made, text = routines.kernel(product, name)
        return made, [matrices.HELPERS, routines.HELPERS, text]
    return call, []


def _product(call: Call) -> Product | None:
    """The product that a call is, if it is one of matrices of one type that lie by rows or by columns."""
    scales = [value for name, value in call.kwargs.items() if name != "out"]
    if call.target not in _TORCHS or any(value != 1 for value in scales):
        return None
    *biases, a, b = call.args
    given = (a, b, call.kwargs["out"])
    types = {view.dtype for view in (*given, *biases)}
    columns = call.kwargs["out"].size[1]
    if types not in ({"float32"}, {"float64"}) or any((v.size, v.stride) != ((columns,), (1,)) for v in biases):
        return None
    left, right, out = (Matrix.of(view) for view in given)
    if left is None or right is None or out is None:
        return None
    return Product(left, right, out, biases[0] if biases else None)
