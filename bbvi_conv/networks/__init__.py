"""Networks whose outputs, slopes and curvatures are bounded by constants known in advance; they know only torch."""

from __future__ import annotations

from bbvi_conv.networks.soft_clipping import SoftClip, soft_clip

__all__ = ["SoftClip", "soft_clip"]
