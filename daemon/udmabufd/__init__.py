# SPDX-License-Identifier: MIT
"""udmabufd: a dma-buf allocator daemon. Imports run one way: bus and system, then core, then linux."""
