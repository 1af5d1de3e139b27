"""``python -m bbvi_conv`` is ``bbvi-conv``."""

from bbvi_conv.cli import app

app(prog_name="bbvi-conv")
