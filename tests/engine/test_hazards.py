"""Generated code that reads a value after its place was overwritten is found, and then writes elsewhere first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bbvi_conv as bc
from bbvi_conv.engine import Stream, start_carry
from bbvi_conv.engine.choose import make_engine
from bbvi_conv.engine.native import lowering
from bbvi_conv.engine.native.hazards import overwritten_too_soon
from bbvi_conv.engine.native.plan import Call, Kernel, Place, View
from bbvi_conv.engine.native.recording import Recorder
from bbvi_conv.program.build import build

HEAD = "static void k(const double* in_ptr0,\n    const double* in_ptr1, double* out_ptr0, double* out_ptr1)\n"
SUM = "{ for(x0=0; x0<4; x0+=1) { { auto tmp0 = in_ptr0[static_cast<int64_t>(x0)]; acc = acc + tmp0; } } %s }"
UPDATE = "{ for(x0=0; x0<4; x0+=1) { auto tmp0 = loadu(in_ptr0 + x0, 4); tmp0.store(out_ptr0 + x0, 4); } }"
LAST = "out_ptr1[static_cast<int64_t>(0L)] = acc;"

CARRIED, OTHER, OUT = 0, 1, 2
PLACES = (Place(CARRIED, 0), Place(OTHER, 0), Place(CARRIED, 0), Place(OUT, 0))


def too_soon(body: str, *later: Kernel | Call) -> bool:
    code = [Kernel("k", ("const double*", "const double*", "double*", "double*"), PLACES), *later]
    return overwritten_too_soon(code, [HEAD + "{" + body + "}"], {CARRIED}, Recorder([]))


def test_a_sum_before_the_update_is_fine_and_one_after_it_is_not() -> None:
    assert not too_soon(SUM % LAST + UPDATE)
    assert too_soon(UPDATE + SUM % LAST)
    assert not too_soon(UPDATE + (SUM % LAST).replace("in_ptr0", "in_ptr1"))  # another input
    assert not too_soon(UPDATE)  # its own old value, place by place


def test_single_values_count_one_by_one() -> None:
    add, double = "out_ptr0[0] = in_ptr0[0] + 1;", "out_ptr1[0] = 2 * in_ptr0[0];"
    assert not too_soon(double + add.replace("out_ptr0[0] = in_ptr0[0] + 1", "auto t = in_ptr0[0]; out_ptr0[0] = t"))
    assert too_soon("auto t = in_ptr0[0]; out_ptr0[0] = t;" + double)


def test_a_pointer_by_another_name_and_a_pointer_handed_to_a_function() -> None:
    renamed = "auto out_ptr7 = out_ptr0;" + UPDATE.replace("out_ptr0", "out_ptr7")
    assert too_soon(renamed + SUM % LAST)
    handed = "for(x0=0; x0<4; x0+=4) { transpose_mxn(tmp, 4, out_ptr0 + x0, 4); }"
    assert too_soon(handed + SUM % LAST)
    assert not too_soon(SUM % LAST + handed)


def test_a_later_call_counts_as_a_reader_unless_it_only_writes() -> None:
    view = View(Place(CARRIED, 0), "float64", (4,), (1,))
    other = View(Place(OTHER, 0), "float64", (4,), (1,))
    assert too_soon(UPDATE, Call("aten.mm.out", (view, other), {"out": other}, ()))
    assert not too_soon(UPDATE, Call("aten.mm.out", (other, other), {"out": other}, ()))
    assert not too_soon(SUM % LAST, Call("aten.mm.out", (other, view), {"out": other}, ()))


@pytest.mark.parametrize("name", ["eight_schools", "vae"])
def test_results_written_elsewhere_first_are_the_same(
    name: str, shipped: Callable[[str], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BBVI_CONV_CACHE", str(tmp_path / "cache"))  # the plan is another than the one in the cache
    asked = []
    monkeypatch.setattr(lowering, "overwritten_too_soon", lambda *given: asked.append(given) or True)
    module = shipped(name)
    if name == "vae":
        images = 255 * torch.randint(0, 2, (16, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        program = build(module.model, module.guide, (images,), minibatch=bc.Minibatch(4, plate="data"))
    else:
        program = build(module.model, args=module.data(), family=bc.FullRank())
    # Adam would make rounding errors of tiny gradients large.
    rule, objective = bc.SGD(bc.Constant(1e-4 if name == "vae" else 1e-3)), bc.ELBO(1)
    start, seen = start_carry(rule, program.initial()), {}
    for engine_name in ("traced", "compiled"):
        engine = make_engine(engine_name, program, objective, rule)
        seen[engine_name], _ = engine.advance(start, Stream(program, 0, "optimise", objective.draws), 0, 5)
    assert len(asked) == 1
    tight = program.dtype == torch.float64
    torch.testing.assert_close(
        seen["compiled"].x, seen["traced"].x, rtol=1e-9 if tight else 1e-4, atol=1e-9 if tight else 1e-5
    )
    assert (seen["traced"].x - start.x).abs().max() > 1e-3
