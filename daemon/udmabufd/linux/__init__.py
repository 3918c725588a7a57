# SPDX-License-Identifier: MIT
"""Thin wrappers of the kernel interfaces that a dma-buf is made with, one module per interface.

They raise OSError, or a subclass of it with a hint where the kernel's answer alone would be cryptic, and know no
policy: sizes, quotas, names and what to do about an error are core's. Descriptors go in as plain ints (borrowed) and
come out as OwnedFd.

Whatever may take long releases the interpreter's lock, so that a worker thread can do it beside an event loop:
os.posix_fallocate, os.ftruncate, os.memfd_create, os.open, fcntl.fcntl and ctypes.CDLL functions do in every CPython,
fcntl.ioctl does for arguments of up to 1024 bytes (Modules/fcntlmodule.c; before 3.14 not for longer ones).
"""
