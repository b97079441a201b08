"""One BLAS thread while a fit runs: its matrices are small, and its own threads are busy with the data."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from weakref import WeakSet


class _User:
    """Somebody for whom BLAS is limited, as long as it lives."""


_lock = threading.RLock()  # the collector may end a forgotten user in a thread that has it
_users: WeakSet[_User] = WeakSet()
_numbers_before: list[int] | None = None


def _forget_users() -> None:
    """In a fork, which has none of the threads that limited BLAS, nor the one that may have held the lock."""
    global _lock, _users, _numbers_before
    _lock, _users, numbers, _numbers_before = threading.RLock(), WeakSet(), _numbers_before, None
    if numbers is not None:
        for library, number in zip(_libraries(), numbers, strict=True):
            library.set_num_threads(number)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_users)


@lru_cache(maxsize=1)
def _libraries() -> list[Any]:
    """threadpoolctl's controllers of BLAS: a scan of the process, once; a limit then takes microseconds."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:  # it is slower to fit with all of BLAS's threads, not wrong
        return []
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit NumPy's BLAS to one thread; the first user sets the limit and the last one lifts it.

    The limit is the whole process's: fits that overlap in several threads must not restore each other's. It is lifted
    after an interrupt at any moment too: a user is there or not, whatever has come of its steps, and those of `_lift`
    can be taken again.
    """
    user = _User()
    try:
        _limit(user)
        yield
    finally:
        try:
            _lift(user)
        except BaseException:
            _lift(user)
            raise


def _limit(user: _User) -> None:
    global _numbers_before
    with _lock:
        _users.add(user)
        if _numbers_before is None:
            _numbers_before = [library.num_threads for library in _libraries()]
            for library in _libraries():
                library.set_num_threads(1)


def _lift(user: _User) -> None:
    global _numbers_before
    with _lock:
        _users.discard(user)
        if not _users and _numbers_before is not None:
            for library, number in zip(_libraries(), _numbers_before, strict=True):
                library.set_num_threads(number)
            _numbers_before = None
