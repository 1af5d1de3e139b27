"""What convergence theorems ask, and whether it holds."""

from __future__ import annotations

from bbvi_conv.theory.check import assumptions, of_fit
from bbvi_conv.theory.condition import Assumptions, Condition, Term

__all__ = ["Assumptions", "Condition", "Term", "assumptions", "of_fit"]
