# SPDX-License-Identifier: MIT
"""Importers without a device: numbers and structures against the kernel's headers, paths that lead to none, reasons.

What real drivers answer is in tests/kernel/test_verify.py.
"""

from __future__ import annotations

import errno
import grp
import os
import re
import shutil
import socket
import stat
from pathlib import Path

import pytest

from tests.unit.headers import layout, values
from udmabufd_client.importers import outcome, v4l2, v4l2_abi, verify
from udmabufd_client.importers.outcome import Refused, Step
from udmabufd_client.importers.v4l2_abi import BufType, Cap
from udmabufd_client.info import BufferInfo

CALLS = ("QUERYCAP", "ENUM_FMT", "G_FMT", "S_FMT", "REQBUFS", "QUERYBUF", "QBUF", "DQBUF", "STREAMON", "STREAMOFF")

STRUCTURES = {
    "v4l2_capability": v4l2_abi.Capability,
    "v4l2_pix_format": v4l2_abi.PixFormat,
    "v4l2_plane_pix_format": v4l2_abi.PlanePixFormat,
    "v4l2_pix_format_mplane": v4l2_abi.PixFormatMplane,
    "v4l2_format": v4l2_abi.Format,
    "v4l2_fmtdesc": v4l2_abi.FmtDesc,
    "v4l2_requestbuffers": v4l2_abi.RequestBuffers,
    "v4l2_plane": v4l2_abi.Plane,
    "v4l2_buffer": v4l2_abi.Buffer,
}

NUMBERS = {
    **{f"VIDIOC_{call}": getattr(v4l2_abi, f"VIDIOC_{call}") for call in (*CALLS, "TRY_FMT")},
    **{f"V4L2_BUF_TYPE_{queue.name}": int(queue) for queue in BufType},
    **{f"V4L2_CAP_{cap.name}": int(cap) for cap in Cap},
    "V4L2_CAP_STREAMING": v4l2_abi.V4L2_CAP_STREAMING,
    "V4L2_CAP_DEVICE_CAPS": v4l2_abi.V4L2_CAP_DEVICE_CAPS,
    "V4L2_MEMORY_MMAP": v4l2_abi.V4L2_MEMORY_MMAP,
    "V4L2_MEMORY_DMABUF": v4l2_abi.V4L2_MEMORY_DMABUF,
    "V4L2_FIELD_ANY": v4l2_abi.V4L2_FIELD_ANY,
    "VIDEO_MAX_PLANES": v4l2_abi.VIDEO_MAX_PLANES,
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the kernel's headers; install gcc")
def test_v4l2_is_as_in_the_headers(tmp_path: Path) -> None:
    """DRM's are compared in the guest, which has its headers."""
    ours = NUMBERS | layout(STRUCTURES)
    assert values("linux/videodev2.h", ours, tmp_path) == ours


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/dev/null", "subsystem mem"),
        ("/etc/passwd", "is a file"),
        ("/dev", "is a directory"),
        ("/nonexistent/video0", "no such node.*ENOENT"),
        ("/etc/passwd/video0", "no directory.*ENOTDIR"),
        ("/dev/" + "x" * 256, "long.*ENAMETOOLONG"),
        ("nul\0byte", "no path"),
        ("", "no such node"),
    ],
)
def test_paths_that_lead_to_no_importer(path: str, words: str) -> None:
    with open(os.devnull, "rb") as buffer:
        found = verify(path, buffer.fileno(), BufferInfo())
    assert (found.taken, found.tried) == (False, False)
    assert re.search(words, found.reason), found.reason
    assert found.reason.endswith(".")


def test_a_pipe_and_a_socket_are_not_opened(tmp_path: Path) -> None:
    """Opening this pipe would wait for ever: nobody reads it."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for kind in ("pipe", "socket"):
            found = verify(str(tmp_path / kind), 0, BufferInfo())
            assert f"is a {kind}" in found.reason


@pytest.mark.root
def test_a_node_without_a_device(tmp_path: Path) -> None:
    node = tmp_path / "card9"
    os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(226, 249))
    found = verify(str(node), 0, BufferInfo())
    assert not found.tried
    assert "226:249, which the kernel does not have now" in found.reason


def test_a_memfd_is_not_for_devices() -> None:
    found = verify("/dev/null", 0, BufferInfo(kind="memfd"))
    assert "is a memfd" in found.reason


@pytest.mark.parametrize("step", list(Step))
def test_every_errno_makes_a_sentence(step: Step) -> None:
    """Whatever a driver answers: cause, the kernel's name of it, and whether the buffer was judged at all."""
    for code in errno.errorcode:
        check_sentence(step, code)


def check_sentence(step: Step, code: int) -> None:
    found = outcome.of(Refused(step, OSError(code, os.strerror(code)), "an import"), "/dev/{path}")
    name = errno.errorcode[code]
    assert found == outcome.Outcome(False, "an import", found.reason, name, step is Step.IMPORT)
    assert found.reason.startswith("/dev/{path} ")
    assert found.reason.endswith(f" ({name}).")


def test_an_errno_that_has_no_name() -> None:
    found = outcome.of(Refused(Step.IMPORT, OSError(999, "Unknown error 999"), ""), "/dev/x")
    assert found.reason == "/dev/x refuses the buffer: Unknown error 999 (999)."


def test_who_may_open_a_node_is_named(tmp_path: Path) -> None:
    node = tmp_path / "video0"
    node.touch()
    group = grp.getgrgid(node.stat().st_gid).gr_name
    refusal = Refused(Step.OPEN, PermissionError(errno.EACCES, "Permission denied"), "")
    for mode, words in ((0o660, f"for root and the group {group}"), (0o600, "for root alone")):
        node.chmod(mode)
        assert words in outcome.of(refusal, str(node)).reason
    node.unlink()
    assert "ask its administrator" in outcome.of(refusal, str(node)).reason


@pytest.mark.parametrize(
    ("caps", "queues"),
    [
        (Cap.VIDEO_CAPTURE, [BufType.VIDEO_CAPTURE]),
        (Cap.VIDEO_M2M_MPLANE, [BufType.VIDEO_OUTPUT_MPLANE, BufType.VIDEO_CAPTURE_MPLANE]),
        (
            Cap.VIDEO_M2M | Cap.VIDEO_CAPTURE | Cap.VIDEO_OUTPUT,
            [BufType.VIDEO_CAPTURE, BufType.VIDEO_OUTPUT],
        ),
        (Cap.META_CAPTURE | Cap.VBI_CAPTURE, [BufType.VBI_CAPTURE, BufType.META_CAPTURE]),
    ],
)
def test_queues_of_a_node(caps: int, queues: list[BufType]) -> None:
    """By the node's own capabilities, not by those of all nodes of the device; none without streaming."""
    whole = caps | Cap.SDR_OUTPUT | v4l2_abi.V4L2_CAP_DEVICE_CAPS | v4l2_abi.V4L2_CAP_STREAMING
    own = caps | v4l2_abi.V4L2_CAP_STREAMING
    assert v4l2.queues_of(v4l2_abi.Capability(capabilities=whole, device_caps=own)) == queues
    assert v4l2.queues_of(v4l2_abi.Capability(capabilities=own)) == queues
    assert v4l2.queues_of(v4l2_abi.Capability(capabilities=whole, device_caps=caps)) == []


def test_output_queues() -> None:
    assert {queue for queue in BufType if queue.output} == {queue for queue in BufType if "OUTPUT" in queue.name}


def test_fourccs_are_the_letters_of_the_headers() -> None:
    assert v4l2_abi.code_of("YUYV") == 0x56595559
    assert v4l2_abi.fourcc(v4l2_abi.code_of("GREY")) == "GREY"
    assert v4l2_abi.fourcc(v4l2_abi.code_of("Y10 ")) == "Y10"
    assert v4l2_abi.fourcc(0x1BFF0041 | 1 << 31) == "A???"
    assert all(len(drm_code) == len(code) == 4 for drm_code, code in v4l2.FOURCCS.items())
