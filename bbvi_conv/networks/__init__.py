"""Networks whose outputs, slopes and curvatures are bounded by constants known in advance; they know only torch."""

from __future__ import annotations

from bbvi_conv.networks.bounded import BoundedLinear, bounded_mlp
from bbvi_conv.networks.constants import Constants, constants
from bbvi_conv.networks.soft_clipping import SoftClipping, soft_clip

__all__ = ["BoundedLinear", "Constants", "SoftClipping", "bounded_mlp", "constants", "soft_clip"]
