"""The pictures that the page's users dropped, kept in memory while they ask about them: no file is written."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b


class Pictures:
    """Pictures' files by the hash of their content; the ones that were used longest ago give way.

    Args:
        most: bytes of all together.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._size = 0
        self._stays: dict[str, bytes] = {}

    def keep(self, content: bytes) -> str:
        """Its name from now on."""
        name = blake2b(content, digest_size=16).hexdigest()
        if name not in self._kept and name not in self._stays:
            self._kept[name] = content
            self._size += len(content)
            while self._size > self.most and len(self._kept) > 1:
                self._size -= len(self._kept.popitem(last=False)[1])
        elif name in self._kept:
            self._kept.move_to_end(name)
        return name

    def keep_always(self, content: bytes) -> str:
        """The same, of the examples: nothing takes their place."""
        name = blake2b(content, digest_size=16).hexdigest()
        self._stays[name] = content
        return name

    def find(self, name: str) -> bytes | None:
        """A picture's file; None: it is not kept, or no longer."""
        if name in self._kept:
            self._kept.move_to_end(name)
        return self._stays.get(name) or self._kept.get(name)
