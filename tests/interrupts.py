"""Ctrl-C at random moments, in a process of its own: programs of tests import this."""

from __future__ import annotations

import _thread
import faulthandler
import random
import signal
import time
from collections.abc import Callable

from emalgam_kernels import blocks

SECONDS_OF_A_HANG = 120
SECONDS_TO_THE_SECOND = 10


def interrupt_at_random(
    call: Callable[[], object], times: int, after_each: Callable[[], object] = lambda: None
) -> None:
    """Repeat `call` until a KeyboardInterrupt ends it, at a random moment of the time that it takes; so often.

    `after_each` is called after every interrupt. A process that hangs ends, with a traceback of all threads.
    """
    faulthandler.dump_traceback_later(SECONDS_OF_A_HANG, exit=True)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    longest, rng = _seconds(call), random.Random(0)
    for _ in range(times):
        try:
            # A second one, for the case that Python ignores the first, which it does in what collects garbage.
            signal.setitimer(signal.ITIMER_REAL, max(rng.uniform(0, longest), 1e-6), SECONDS_TO_THE_SECOND)
            while True:
                call()
        except KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
        after_each()
    faulthandler.cancel_dump_traceback_later()


def _seconds(call: Callable[[], object]) -> float:
    """What a call takes, once everything is loaded."""
    call()
    start = time.perf_counter()
    for _ in range(5):
        call()
    return (time.perf_counter() - start) / 5


def assert_threads_are_idle() -> None:
    """Every thread of this process but its first waits for work, at the latest after what it is doing."""
    for _ in range(1000):
        if _thread._count() == len(blocks._idle):
            return
        time.sleep(0.01)
    raise AssertionError(f"there are {_thread._count()} threads, and {len(blocks._idle)} of them wait for work")
