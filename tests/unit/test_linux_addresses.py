# SPDX-License-Identifier: MIT
"""The highest address of memory, as the kernel's lists of zones tell it, against its map of memory."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest

from udmabufd.linux.addresses import highest_address_bits

DMA32 = """\
Node 0, zone    DMA32
  per-node stats
      nr_inactive_anon 2591
      nr_present_like  99999999999
  pages free     3840
        boost    0
        min      15
        spanned  1044480
        present  782336
        managed  765952
        cma      0
        protection: (0, 0, 21339, 21339, 21339)
      nr_free_pages 3840
  pagesets
    cpu: 0
              count:    0
              high:     19
  vm stats threshold: 6
  node_unreclaimable:  0
  start_pfn:           4096
"""
NORMAL = DMA32.replace("DMA32", "Normal").replace("4096", "1048576").replace("1044480", "5505024")
# As the kernel ends the list of a zone without pages: no start.
MOVABLE = """\
Node 0, zone  Movable
  pages free     0
        spanned  0
        present  0
        managed  0
        protection: (0, 0, 0, 0, 0)
"""
# Memory that was announced beyond all other, and is not there: offline.
OFFLINE = MOVABLE.replace("spanned  0", "spanned  68719476736")


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        # Frames 4096 + 1044480 end at 4 GiB: the highest byte has 32 bits, not 33.
        (DMA32, 32),
        # 1048576 + 5505024 frames are 25 GiB.
        (DMA32 + NORMAL + MOVABLE, 35),
        (NORMAL.replace("Node 0", "Node 1") + MOVABLE + DMA32, 35),
        (DMA32 + OFFLINE, 32),
        (DMA32.replace("1044480", "1044481"), 33),
        # A machine with one page.
        (DMA32.replace("4096", "0").replace("1044480", "1"), 12),
    ],
)
@pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="the figures are of pages of 4 KiB")
def test_known_machines(tmp_path: Path, text: str, bits: int) -> None:
    (tmp_path / "zoneinfo").write_text(text)
    assert highest_address_bits(tmp_path / "zoneinfo") == bits


@pytest.mark.parametrize(
    "text",
    [
        "",
        MOVABLE,
        "Node 0, zone\n",
        DMA32.replace("  start_pfn:           4096\n", ""),
        DMA32.replace("spanned", "stretched"),
        DMA32.replace("present", "absent"),
        # One zone that is not understood may be the highest.
        DMA32 + NORMAL.replace("start_pfn", "start"),
        "\xff" + DMA32,
    ],
)
def test_what_is_not_understood_is_not_known(tmp_path: Path, text: str) -> None:
    (tmp_path / "zoneinfo").write_bytes(text.encode("latin-1"))
    assert highest_address_bits(tmp_path / "zoneinfo") is None


def test_what_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    assert highest_address_bits(tmp_path / "zoneinfo") is None
    assert highest_address_bits(tmp_path) is None


def test_this_machine() -> None:
    memory = [
        int(found[1], 16) for found in re.finditer(r"-([0-9a-f]+) : System RAM", Path("/proc/iomem").read_text())
    ]
    if not any(memory):
        pytest.skip("only root, and not in every container, sees the addresses in /proc/iomem")
    # The kernel may leave the last part of it unused, never use more.
    bits = highest_address_bits()
    assert bits is not None
    assert 0 <= max(memory).bit_length() - bits <= 1
