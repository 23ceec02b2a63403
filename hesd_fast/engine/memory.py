"""Memory: what is free, what this process holds, and the most that it holds while something runs."""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

from hesd_fast.engine import cuda

SAMPLING_SECONDS = 0.002
"""Between two looks at the memory of a process; a look takes some microseconds."""

_PAGE = resource.getpagesize()


class _Looks(threading.local):
    """What this thread has seen within :func:`one_look`."""

    seen: dict[torch.device | None, int | None] | None = None


_looks = _Looks()


@contextmanager
def one_look() -> Iterator[None]:
    """Let :func:`available_memory` answer within as it did at first: a run decides everything from one number.

    So a plan made before a run is the plan of the run, whatever other processes or the run itself have taken since.
    """
    if _looks.seen is not None:
        yield
        return
    _looks.seen = {}
    try:
        yield
    finally:
        _looks.seen = None


def available_memory(device: torch.device | None = None) -> int | None:
    """Return how many bytes of memory, or of a device's, can be had without swapping; None if unknown."""
    where = device if device is not None and cuda.runtime.is_cuda(device) else None
    if _looks.seen is None:
        return _look(where)
    if where not in _looks.seen:
        _looks.seen[where] = _look(where)
    return _looks.seen[where]


def free_memory(device: torch.device) -> int | None:
    """Return the same as it is now, also within :func:`one_look`: for what has to fit beside all that is held."""
    return _look(device if cuda.runtime.is_cuda(device) else None)


def _look(device: torch.device | None) -> int | None:
    if device is not None:
        return cuda.runtime.free_memory(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def resident_memory() -> int | None:
    """Return the bytes of this process that are in memory now, or None where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as line:
            return int(line.read().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return None


def peak_memory() -> int:
    """Return the most bytes of this process that have been in memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class MemoryWatch:
    """Looks at the resident memory again and again from a thread of its own, in a ``with`` block.

    The system keeps the peak of the whole life of a process only, and clearing that would take it from everyone else.
    """

    def __init__(self) -> None:
        self._peak = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def peak(self) -> int | None:
        """Return the most bytes seen since the last call, those of now included; None where the system does not say."""
        now = resident_memory()
        if now is None:
            return None
        peak, self._peak = max(self._peak, now), 0
        return peak

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLING_SECONDS):
            self._peak = max(self._peak, resident_memory() or 0)

    def __enter__(self) -> MemoryWatch:
        if resident_memory() is not None:
            self._thread = threading.Thread(target=self._watch, name="hesd-fast memory watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
