"""What the server remembers of the browser windows that it has heard of last.

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
            if session is None:
                return self._new()
            value = self._values.setdefault(session, self._new())
            self._tidy(session)
            return value

    def put(self, session: str | None, value: T) -> None:
        """Remembers the window's value."""
        with self._lock:
            if session is not None:
                self._values[session] = value
                self._tidy(session)

    def replace(self, session: str | None, old: T, new: T) -> bool:
        """Remembers `new` where `old`, the very object, is still the window's value; says whether
        it was. So what has been ended or begun anew meanwhile stays so."""
        with self._lock:
            if session is None:
                return True
            if self._values.get(session) is not old:
                return False
            self._values[session] = new
            return True

    def _tidy(self, newest: str) -> None:
        self._values.move_to_end(newest)
        while len(self._values) > self._most:
            self._values.popitem(last=False)
