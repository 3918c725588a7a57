# SPDX-License-Identifier: MIT
"""What the daemon and its clients both stand on: owned descriptors, the DMA_BUF sync bracket, one D-Bus connection.

A leaf: it imports the standard library and, in codec.py alone, the D-Bus library. It knows nothing of buffers,
allocators or the interface of udmabufd; names of that interface are udmabufd_client.contract's.
"""
