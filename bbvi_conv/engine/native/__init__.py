"""Graphs as compiled loops over fixed memory: T steps in one call, no allocation, no Python between them."""

from __future__ import annotations

from bbvi_conv.engine.native.library import NoCompiler
from bbvi_conv.engine.native.loop import NativeLoop, StoppedEarly
from bbvi_conv.engine.native.plan import CannotCompile

__all__ = ["CannotCompile", "NativeLoop", "NoCompiler", "StoppedEarly"]
