"""Ctrl-C at an instant of our choosing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held() -> Iterator[None]:
    """Ctrl-C within the block is heard at its end.

    Needed where a folder is removed: ``shutil.rmtree`` interrupted between closing a descriptor and noting that it did
    closes it again, and the ``KeyboardInterrupt`` comes out as an ``OSError``. An error of the block comes first.
    Outside the main thread, where Python hears no signals, and without a handler of Python's, nothing is held.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    heard = []
    signal.signal(signal.SIGINT, lambda *arguments: heard.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if heard:
        handler(*heard[-1])
