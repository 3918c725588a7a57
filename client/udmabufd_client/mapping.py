# SPDX-License-Identifier: MIT
"""One shared mapping of a buffer with a reference count, and the handles on it.

Knows neither the service nor the sync bracket (bracket.py). Maps with MAP_SHARED, which dma-bufs require.
"""

from __future__ import annotations

import mmap
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from udmabufd_base.fd import OwnedFd
from udmabufd_client.gate import Gate


class SharedMapping:
    """The one mapping of a buffer in this process: made by the first user, dropped with the last.

    Users are Map handles, and whatever took the buffer protocol of the memory (an array, a memoryview): memory is
    never unmapped under either. Safe from several threads. The gate is told of what is mapped.
    """

    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        # Reentrant: a garbage collection inside may end a handle of this very mapping.
        self._lock = threading.RLock()
        self._count = 0
        self._mapped: mmap.mmap | None = None
        self._latest: weakref.ref[mmap.mmap] | None = None

    def acquire(self, dup: Callable[[], OwnedFd], size: int) -> mmap.mmap:
        """Count one user more and return the mapping of `size` bytes, made from `dup()` if there is none.

        `dup` returns a descriptor for this call to close. Raises OSError as mmap(2) does, and what `dup` raises.
        """
        mapped = self._acquire(None, size)
        if mapped is None:
            # Without our lock: dup() takes the buffer's, and a garbage collection under that one may want ours.
            with dup() as fd:
                mapped = self._acquire(fd, size)
            assert mapped is not None
        return mapped

    def release(self) -> None:
        """Count one user less; after the last one the memory is unmapped as soon as nothing refers to it."""
        with self._lock:
            assert self._count > 0
            self._count -= 1
            if self._count == 0:
                mapped, self._mapped = self._mapped, None
                assert mapped is not None
                # BufferError: an array still uses the memory, and unmaps it when it goes.
                with suppress(BufferError):
                    mapped.close()
                    self.gate.unmapped(mapped)

    def export(self, dup: Callable[[], OwnedFd], size: int) -> memoryview:
        """Return a view that keeps the mapping by itself, without a handle."""
        view = memoryview(self.acquire(dup, size))
        self.release()
        return view

    @property
    def users(self) -> int:
        """Handles that are open."""
        return self._count

    @property
    def mapped(self) -> bool:
        """Whether the memory is mapped, be it for handles or for what took its buffer protocol."""
        return self._living() is not None

    def _acquire(self, fd: OwnedFd | None, size: int) -> mmap.mmap | None:
        """Count one user more and return the mapping; None, and nothing counted, if there is neither it nor `fd`."""
        with self._lock:
            # Counted first, so that such an end does not drop what is about to be handed out.
            self._count += 1
            try:
                if self._mapped is None:
                    # A mapping that the last handle left to an array is still the one mapping.
                    left = self._living()
                    if left is None and fd is not None:
                        left = mmap.mmap(fd.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
                        self._latest = weakref.ref(left)
                        self.gate.mapped(left)
                    self._mapped = left
                return self._mapped
            finally:
                if self._mapped is None:
                    self._count -= 1

    def _living(self) -> mmap.mmap | None:
        mapped = self._latest() if self._latest is not None else None
        return None if mapped is None or mapped.closed else mapped


class Map:
    """A handle on a buffer's mapping: `with buffer.map() as view`, or `view` until close().

    A handle that is dropped without close() gives way with a ResourceWarning; a view taken from it stays valid.
    """

    def __init__(
        self, mapping: SharedMapping, dup: Callable[[], OwnedFd], size: int, *, writable: bool, label: str
    ) -> None:
        self._mapping: SharedMapping | None = None
        self._label = label
        whole = memoryview(mapping.acquire(dup, size))
        self._mapping = mapping
        mapping.gate.opened(self)
        self._view = whole if writable else whole.toreadonly()

    @property
    def view(self) -> memoryview:
        """The buffer's bytes. Raises ValueError after close()."""
        if self._mapping is None:
            raise ValueError(f"this map of {self._label} is closed")
        return self._view

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._mapping is None

    def close(self) -> None:
        """End the view and give up the mapping; harmless when repeated.

        Arrays and slices made of the view stay valid, and keep the memory mapped, until they are gone.
        """
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            # BufferError: an array was made of the view itself.
            with suppress(BufferError):
                self._view.release()
            del self._view
            mapping.release()
            mapping.gate.ended(self)

    def __enter__(self) -> memoryview:
        return self.view

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._mapping is not None:
            warnings.warn(f"unclosed map of {self._label}", ResourceWarning, stacklevel=2, source=self)
            mapping, self._mapping = self._mapping, None
            # The view may be in use elsewhere, and then keeps the memory; this one reference must not.
            del self._view
            mapping.release()
            mapping.gate.ended(self)

    def __repr__(self) -> str:
        return f"<Map of {self._label}{', closed' if self.closed else ''}>"
