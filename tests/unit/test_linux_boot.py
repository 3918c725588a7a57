# SPDX-License-Identifier: MIT
"""linux.boot: command lines and configurations as kernels have them."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from udmabufd.linux import boot

ON, OFF = "CONFIG_INIT_ON_ALLOC_DEFAULT_ON=y\n", "# CONFIG_INIT_ON_ALLOC_DEFAULT_ON is not set\n"


def config(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def zeroed(tmp_path: Path, cmdline: str, *configs: Path) -> bool:
    file = tmp_path / "cmdline"
    file.write_text(f"{cmdline}\n")
    return boot.zeroed_at_allocation(file, configs)


@pytest.mark.parametrize(
    ("cmdline", "with_on", "with_off"),
    [
        ("quiet splash", True, False),
        ("", True, False),
        ("quiet init_on_alloc=0", False, False),
        ("init_on_alloc=1 quiet", True, True),
        ("init_on_alloc=on", True, True),
        ("init_on_alloc=OFF", False, False),
        ("init_on_alloc=N", False, False),
        ("init_on_alloc=Yes", True, True),
        ("init-on-alloc=1", True, True),
        ('"init_on_alloc=1" quiet', True, True),
        ('init_on_alloc="0"', False, False),
        # The last counts.
        ("init_on_alloc=0 init_on_alloc=1", True, True),
        ("init_on_alloc=1 init_on_alloc=0", False, False),
        # Not this parameter, or not a value.
        ("init_on_alloc", True, False),
        ("init_on_alloc=", True, False),
        ("init_on_alloc=x", True, False),
        ("init_on_alloc=1 init_on_alloc=x", True, True),
        ("init_on_free=1", True, False),
        ("xinit_on_alloc=1", True, False),
        ('dyndbg="file a init_on_alloc=1"', True, False),
        ("quiet -- init_on_alloc=1", True, False),
        # Pages are filled with a pattern instead.
        ("init_on_alloc=1 page_poison=1", False, False),
        ("init_on_alloc=1 page_poison=0", True, True),
    ],
)
def test_command_lines(tmp_path: Path, cmdline: str, with_on: bool, with_off: bool) -> None:
    """The parameter, else the configuration."""
    assert zeroed(tmp_path, cmdline, config(tmp_path / "on", ON)) is with_on
    assert zeroed(tmp_path, cmdline, config(tmp_path / "off", OFF)) is with_off


def test_configurations(tmp_path: Path) -> None:
    """The first that can be read decides; compressed ones are read; without any, nothing is known."""
    on, off = config(tmp_path / "on", ON), config(tmp_path / "off.gz", f"CONFIG_A=m\n{OFF}")
    packed = config(tmp_path / "on.gz", f"CONFIG_A=m\n{ON}CONFIG_B=y\n")
    missing, broken = tmp_path / "missing", tmp_path / "broken.gz"
    broken.write_bytes(b"no archive")
    assert zeroed(tmp_path, "", missing, broken, on, off) is True
    assert zeroed(tmp_path, "", missing, off, on) is False
    assert zeroed(tmp_path, "", packed) is True
    assert zeroed(tmp_path, "", config(tmp_path / "old", "CONFIG_A=y\n"), on) is False
    assert zeroed(tmp_path, "", config(tmp_path / "other", f"X{ON}"), packed) is False
    assert zeroed(tmp_path, "", missing, broken) is False
    assert zeroed(tmp_path, "") is False
    truncated = tmp_path / "truncated.gz"
    truncated.write_bytes(packed.read_bytes()[:-12])
    assert zeroed(tmp_path, "", truncated) is False


def test_no_command_line(tmp_path: Path) -> None:
    """A parameter that cannot be seen might say no."""
    assert boot.zeroed_at_allocation(tmp_path / "missing", [config(tmp_path / "on", ON)]) is False


FLAGS = "processor\t: 0\nflags\t\t: fpu mtrr pge cmov pat pse36\nbugs\t\t: none\n"
WITH_PAT, WITHOUT_PAT = "CONFIG_X86_PAT=y\n", "# CONFIG_X86_PAT is not set\n"


def combining(
    tmp_path: Path,
    cmdline: str = "quiet",
    cpuinfo: str = FLAGS,
    text: str = WITH_PAT,
    machine: str = "x86_64",
    release: str = "6.12.9-amd64",
) -> bool:
    """Ask of a machine that is so."""
    (tmp_path / "cmdline").write_text(cmdline)
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    configs = [config(tmp_path / "config", text)]
    return boot.write_combining(
        tmp_path / "cmdline", tmp_path / "cpuinfo", configs, machine, release, tmp_path / "mtrr"
    )


@pytest.mark.parametrize(
    "text", [None, "", "\n", "reg00: base=0x0c0000000 ( 3072MB), size= 1024MB, count=1: uncachable\n"]
)
def test_older_kernels_want_mtrrs_for_it(tmp_path: Path, text: str | None) -> None:
    """Enabled ones, which the firmware of a small virtual machine leaves out."""
    if text is not None:
        (tmp_path / "mtrr").write_text(text)
    for release in ("6.1.0-44-amd64", "5.18.0", "5.4", "4.19.300", "6.1", "next"):
        assert combining(tmp_path, release=release) is bool(text and text.strip()), release
        assert combining(tmp_path, machine="aarch64", release=release)
    for release in ("6.2.0-rc1", "6.12.9", "6.20.0", "7.2.13", "10.0"):
        assert combining(tmp_path, release=release), release


@pytest.mark.parametrize(
    ("cmdline", "expected"),
    [
        ("quiet", True),
        ("quiet nopat", False),
        ("nopat=0", False),
        ('"nopat" quiet', False),
        ("nopatx xnopat", True),
        ("a='nopat'", True),
        ('dyndbg="file nopat"', True),
        ("quiet -- nopat", True),
    ],
)
def test_page_attribute_tables_can_be_turned_off(tmp_path: Path, cmdline: str, expected: bool) -> None:
    """By a parameter of whatever value."""
    assert combining(tmp_path, f"{cmdline}\n") is expected


@pytest.mark.parametrize("machine", ["x86_64", "i686"])
def test_a_processor_may_lack_them(tmp_path: Path, machine: str) -> None:
    """Or what older kernels want beside them."""
    assert combining(tmp_path, machine=machine)
    for flag in (" pat", " mtrr"):
        assert not combining(tmp_path, cpuinfo=FLAGS.replace(flag, ""), machine=machine)
    assert not combining(tmp_path, cpuinfo="processor\t: 0\n", machine=machine)


def test_a_kernel_may_lack_them(tmp_path: Path) -> None:
    """Which its configuration tells; without one, it is as almost all are."""
    assert not combining(tmp_path, text=WITHOUT_PAT)
    assert combining(tmp_path)
    assert boot.write_combining(tmp_path / "cmdline", tmp_path / "cpuinfo", [tmp_path / "missing"], "x86_64", "6.12")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """They might say no."""
    assert combining(tmp_path)
    for name in ("cmdline", "cpuinfo"):
        (tmp_path / name).rename(tmp_path / "away")
        assert not boot.write_combining(tmp_path / "cmdline", tmp_path / "cpuinfo", [], "x86_64", "6.12")
        (tmp_path / "away").rename(tmp_path / name)


@pytest.mark.parametrize(("machine", "expected"), [("aarch64", True), ("armv7l", True), ("riscv64", False)])
def test_other_machines(tmp_path: Path, machine: str, expected: bool) -> None:
    """What is not known counts as no."""
    assert combining(tmp_path, "nopat", "", WITHOUT_PAT, machine) is expected


def test_this_kernel() -> None:
    """Some answer comes from the files of the machine at hand."""
    assert boot.zeroed_at_allocation() in (True, False)
    assert boot.write_combining() in (True, False)
