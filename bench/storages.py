"""A ledger of tensor memory: bytes held now, and the most held at once."""

from __future__ import annotations

import weakref

import torch


class Ledger:
    """Counts each storage from when it is noted until it is freed.

    Attributes:
        live, peak: bytes held now, and at the worst moment so far.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def note(self, storage: torch.UntypedStorage, size: int) -> None:
        """Enter a storage with ``size`` bytes, unless it is known. With size 0 it never counts."""
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
