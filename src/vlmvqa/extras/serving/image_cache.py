"""In-memory cache of the images uploaded to the page; nothing is written to disk."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b


class ImageCache:
    """Image files by the hash of their content; the least recently used are evicted.

    Args:
        max_bytes: total size, without the pinned images.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._cached: OrderedDict[str, bytes] = OrderedDict()
        self._num_bytes = 0
        self._pinned: dict[str, bytes] = {}

    def add(self, content: bytes, pinned: bool = False) -> str:
        """Store an image file and return its name.

        Args:
            pinned: never evict it, and don't count its size.
        """
        name = blake2b(content, digest_size=16).hexdigest()
        if pinned:
            self._pinned[name] = content
        elif name not in self._pinned:
            self._num_bytes += len(content) - len(self._cached.pop(name, b""))
            self._cached[name] = content
            while self._num_bytes > self.max_bytes and len(self._cached) > 1:
                self._num_bytes -= len(self._cached.popitem(last=False)[1])
        return name

    def get(self, name: str) -> bytes | None:
        """Return an image file; None if it isn't cached."""
        if name in self._cached:
            self._cached.move_to_end(name)
        return self._pinned.get(name) or self._cached.get(name)
