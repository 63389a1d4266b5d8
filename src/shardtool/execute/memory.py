"""How much memory of its own this process has: heap, buffers and stacks, without the files that are mapped into it."""

from __future__ import annotations

import resource
import sys
import threading
import time
from pathlib import Path

_STATUS = Path("/proc/self/status")
_SECONDS = 0.25  # between looks


def anonymous_memory() -> int:
    """Anonymous memory in bytes (RssAnon); where the system does not tell, the most that was ever resident."""
    try:
        return int(_STATUS.read_text().split("RssAnon:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Memory:
    """The peak of anonymous memory over the looks at it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._peak, self._next = 0, 0.0

    def look(self) -> int:
        """The peak so far. Cheap: looks that follow each other closely are one."""
        now = time.monotonic()
        with self._lock:
            if now >= self._next:
                self._next = now + _SECONDS
                self._peak = max(self._peak, anonymous_memory())
            return self._peak
