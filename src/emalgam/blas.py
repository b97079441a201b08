"""One BLAS thread while a fit runs: its matrices are small, and its own threads are busy with the data."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

_lock = threading.Lock()
_users = 0
_limited: Any = None


@lru_cache(maxsize=1)
def _controller() -> Any:
    """Scans the process once; the limit itself then takes microseconds. None without threadpoolctl."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:  # it is slower to fit with all of BLAS's threads, not wrong
        return None
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit NumPy's BLAS to one thread; the first user sets the limit and the last one lifts it.

    The limit is the whole process's: fits that overlap in several threads must not restore each other's.
    """
    global _users, _limited
    with _lock:
        if _users == 0 and _controller() is not None:
            _limited = _controller().limit(limits=1, user_api="blas")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _limited is not None:
                _limited.restore_original_limits()
                _limited = None
