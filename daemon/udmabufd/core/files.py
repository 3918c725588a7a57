# SPDX-License-Identifier: MIT
"""Which open file is which buffer's: of the memory that it has, and of former memory that somebody still has.

A descriptor from before a move stands for the buffer just as a new one does.
"""

from __future__ import annotations

from udmabufd.core.buffer import Buffer
from udmabufd.core.errors import NoSuchBuffer
from udmabufd.core.memory import Memory
from udmabufd_client.contract import Kind

FileId = tuple[tuple[int, int], int]
"""Device and inode of an open file."""


class Files:
    """The buffers by what clients have of them."""

    def __init__(self) -> None:
        self._buffers: dict[FileId, Buffer] = {}
        self._former: dict[Buffer, set[FileId]] = {}

    def add(self, buffer: Buffer, memory: Memory) -> None:
        """Have the file of `memory` stand for `buffer`, if clients can have that file."""
        if memory.dma_buf is not None or buffer.request.kind is Kind.MEMFD:
            self._buffers[memory.device, memory.inode] = buffer

    def add_former(self, buffer: Buffer, memory: Memory) -> None:
        """Have the file of `memory`, which `buffer` has no more, stand for it."""
        if memory.dma_buf is not None:
            file = memory.device, memory.inode
            self._buffers[file] = buffer
            self._former.setdefault(buffer, set()).add(file)

    def remove(self, memory: Memory) -> None:
        """Forget the file of `memory`: nobody has it any more, or its buffer is forgotten."""
        file = memory.device, memory.inode
        buffer = self._buffers.pop(file, None)
        if buffer is not None and (former := self._former.get(buffer)) is not None:
            former.discard(file)
            if not former:
                del self._former[buffer]

    def forget(self, buffer: Buffer) -> None:
        """Forget all files of `buffer`, former ones included: none of them stands for anything."""
        for file in self._former.pop(buffer, ()):
            self._buffers.pop(file, None)
        if buffer.memory is not None and self._buffers.get((buffer.memory.device, buffer.memory.inode)) is buffer:
            self.remove(buffer.memory)

    def find(self, device: tuple[int, int], inode: int) -> Buffer:
        """Return the buffer whose file this is; it may linger. Raises NoSuchBuffer."""
        try:
            return self._buffers[device, inode]
        except KeyError:
            raise NoSuchBuffer from None

    def knows(self, device: tuple[int, int], inode: int) -> bool:
        """Whether this is the file of a buffer."""
        return (device, inode) in self._buffers
