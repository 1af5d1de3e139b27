"""Engines run T steps of (program, objective, optimiser); same noise, same iterates."""

from __future__ import annotations

from bbvi_conv.engine.calculus import Calculus
from bbvi_conv.engine.choose import ENGINES, make_engine
from bbvi_conv.engine.compiled import CompiledEngine
from bbvi_conv.engine.engine import Carry, EagerEngine, Engine, TracedEngine, start_carry
from bbvi_conv.engine.streams import Stream

__all__ = [
    "ENGINES",
    "Calculus",
    "Carry",
    "CompiledEngine",
    "EagerEngine",
    "Engine",
    "Stream",
    "TracedEngine",
    "make_engine",
    "start_carry",
]
