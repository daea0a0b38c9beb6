"""What the server remembers of a browser's window while it is open.

gr.State would do the same, but makes every window hold a connection of its own all the time, and a
browser opens six to one address: with a few windows of a run in sight, the next would stay empty.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Sessions(Generic[T]):
    """A value for each window, by its session's hash; those not used for the longest time go.

    Args:
        new: makes the value of a window that is not known.
        most: windows remembered.
    """

    def __init__(self, new: Callable[[], T], most: int = 256):
        self._new = new
        self._most = most
        self._values: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, session: str | None) -> T:
        """The window's value; a new one where it has none, or says not who it is."""
        with self._lock:
            if session is None or session not in self._values:
                return self._new()
            self._values.move_to_end(session)
            return self._values[session]

    def put(self, session: str | None, value: T) -> None:
        """Remembers the window's value."""
        with self._lock:
            if session is None:
                return
            self._values[session] = value
            self._values.move_to_end(session)
            while len(self._values) > self._most:
                self._values.popitem(last=False)
