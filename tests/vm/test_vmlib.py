# SPDX-License-Identifier: MIT
"""The parts of tests/vm/run that can be tried without booting: command line, cache, initrd, module order, layer."""

from __future__ import annotations

import lzma
import os
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from tests.vm.vmlib import cli, headers, host, layer, machine, module
from tests.vm.vmlib.cache import cached
from tests.vm.vmlib.image import read_list
from tests.vm.vmlib.initrd import GUEST_INIT, write_initrd
from tests.vm.vmlib.kernel import Kernel, take_boot_modules
from tests.vm.vmlib.report import Report, VmError, run_step

QUIET = Report(quiet=True)


@pytest.mark.parametrize(
    "argv",
    [["true"], ["--"], [], ["--memory", "0", "--", "true"], ["--share", "/no/such", "--", "true"], ["x", "--", "y"]],
)
def test_wrong_usage_is_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(argv)
    assert end.value.code == 2


def test_what_follows_the_dashes_is_the_command_word_by_word() -> None:
    options = cli.parse(["--memory", "2G", "--append", "a b", "--", "sh", "-c", "exit 7", "--", "--help"])
    assert options.command == ["sh", "-c", "exit 7", "--", "--help"]
    assert (options.memory, options.append) == (2048, ["a b"])


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.count("  tests/vm/run ") >= 8


def test_a_cached_directory_is_made_once_and_old_ones_go(tmp_path: Path) -> None:
    made: list[str] = []

    def make(target: Path) -> None:
        made.append(target.name)
        (target / "file").write_text("content")

    for number, key in enumerate(("a", "b", "c", "c")):
        entry = cached(QUIET, tmp_path, key, 2, make)
        assert (entry / "file").read_text() == "content"
        os.utime(entry, (number, number))
    assert len(made) == 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["b", "c"]


def test_a_failed_making_leaves_nothing(tmp_path: Path) -> None:
    def make(target: Path) -> None:
        (target / "half").write_text("")
        raise VmError("no")

    with pytest.raises(VmError):
        cached(QUIET, tmp_path, "a", 2, make)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_failed_step_shows_what_it_said() -> None:
    with pytest.raises(VmError, match=r"(?s)status 3.*the last words.*try this"):
        run_step(QUIET, "a step", ["sh", "-c", "echo the last words; exit 3"], hint="try this")


def test_boot_modules_come_in_an_order_that_loads(tmp_path: Path) -> None:
    modules = tmp_path / "6.0-test"
    depends: dict[str, list[str]] = {
        name: [] for name in ("virtio_pci", "virtio_blk", "virtio_console", "9pnet", "mbcache", "jbd2")
    }
    depends |= {"9pnet_virtio": ["9pnet"], "9p": ["9pnet"], "jbd2": ["crc32c"], "ext4": ["jbd2", "crc32c", "mbcache"]}
    depends["crc32c"] = []
    modules.mkdir()
    lines = []
    for name, needed in depends.items():
        (modules / f"{name.replace('_', '-')}.ko.xz").write_bytes(lzma.compress(name.encode()))
        lines.append(
            f"{name.replace('_', '-')}.ko.xz: " + " ".join(f"{word.replace('_', '-')}.ko.xz" for word in needed)
        )
    (modules / "modules.dep").write_text("\n".join(lines) + "\n")
    (modules / "modules.builtin").write_text("")
    take_boot_modules(modules, tmp_path / "out")
    order = [line.removesuffix(".ko") for line in (tmp_path / "out/order").read_text().split()]
    assert len(order) == len(set(order)) == len(depends)
    for name, needed in depends.items():
        assert all(order.index(word) < order.index(name) for word in needed), (name, order)
    assert (tmp_path / "out/ext4.ko").read_bytes() == b"ext4"


def test_a_missing_boot_module_is_named(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text("")
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    with pytest.raises(VmError, match="virtio_blk"):
        take_boot_modules(tmp_path, tmp_path / "out")


def read_cpio(data: bytes) -> Iterator[tuple[str, tuple[int, bytes]]]:
    """Name, mode and content of each member of a "newc" archive, by its description in the kernel's documentation."""
    at = 0
    while at < len(data):
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size].rstrip(b"\0").decode()
        content = (at + 110 + name_size + 3) & ~3
        yield name, (mode, data[content : content + size])
        at = (content + size + 3) & ~3


def test_the_initrd_is_a_cpio_archive(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/busybox").write_bytes(b"x" * 1001)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/order").write_text("a.ko\n")
    write_initrd(tmp_path / "initrd", tmp_path, tmp_path / "modules")
    members = dict(read_cpio((tmp_path / "initrd").read_bytes()))
    assert members["init"] == (0o100755, GUEST_INIT.read_bytes())
    assert members["bin/busybox"] == (0o100755, b"x" * 1001)
    assert members["modules/order"] == (0o100644, b"a.ko\n")
    assert members["proc"] == (0o040755, b"")
    assert list(members)[-1] == "TRAILER!!!"


def test_the_layer_of_a_boot(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("CONFIG_UDMABUF=y\n")
    config.chmod(0o600)
    job = layer.Job(["echo", "\udcff"], "dbus-broker", service=True)
    layer.write_layer(tmp_path / "tar", job, [Path("tests/vm/run"), Path("tests/vm/gone")], config, "6.0")
    with tarfile.open(tmp_path / "tar") as tar:
        members = {member.name: member for member in tar}
    assert members["src/tests/vm/run"].mode == 0o755
    assert "src/tests/vm/gone" not in members
    assert members["boot/config-6.0"].mode == 0o644
    assert members["etc/systemd/system/dbus.service"].linkname.endswith("/dbus-broker.service")
    # The machine has graphics cards, and nothing but modprobe by name makes DRM devices of them.
    assert members["etc/modprobe.d/udmabufd-vm.conf"].mode == 0o644
    for unit in read_list(layer.GUEST / "masked-units"):
        assert members[f"etc/systemd/system/{unit}"].linkname == "/dev/null"
    assert {(member.uid, member.gid) for member in members.values()} == {(0, 0)}


def test_what_pip_is_told_of_is_found(tmp_path: Path) -> None:
    index = tmp_path / "index/simple"
    index.mkdir(parents=True)
    text = f"find-links = {tmp_path} /no/such/path\nextra-index-url = https://example.org/simple file://{index}\n"
    assert list(host.paths_in(text)) == [tmp_path, index.parent]


def test_a_guest_that_cannot_start_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In QEMU's place, which is only installed with the first guest: what ends as it does without a kernel to load.
    stand_in = tmp_path / "bin" / "qemu-system-x86_64"
    stand_in.parent.mkdir()
    stand_in.write_text("#!/bin/sh\necho 'could not load kernel' >&2\nexit 1\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    hardware = machine.Hardware(tmp_path / "none", tmp_path / "none", "", 64, 1, [], None)
    began = time.monotonic()
    with (
        machine.Machine(QUIET, hardware, tmp_path / "console") as guest,
        pytest.raises(VmError, match="QEMU ended") as end,
    ):
        guest.run(30)
    assert end.value.status == machine.BROKEN
    assert time.monotonic() - began < 25


def test_without_headers_the_guest_boots_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*_: object) -> NoReturn:
        raise VmError("no packaged kernel 1.2.3-amd64", 2)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(headers, "find_kernel", unknown)
    assert headers.get_headers(Report(), tmp_path, Kernel("1.2.3-amd64", tmp_path)) is None
    assert "no kernel module can be built in this guest" in capsys.readouterr().err
    assert not list((tmp_path / "udmabufd/vm/headers").glob("[!.]*"))


def test_the_guest_looks_for_the_module_where_the_layer_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def built(*arguments: object) -> None:
        shared = arguments[4]
        assert isinstance(shared, dict)
        (shared["/module"] / module.NAME).write_bytes((shared["/module"] / "udmabuf_cache.c").read_bytes())

    def broken(*_: object) -> NoReturn:
        raise VmError("does not compile")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sources = [module.FOLDER / name for name in ("udmabuf_cache.c", "Makefile")]
    ask = partial(module.get_module, Report(), tmp_path, Kernel("6.0", tmp_path), tmp_path)
    monkeypatch.setattr(module, "run_in_root", broken)
    assert ask(sources) is None
    assert "does not compile" in capsys.readouterr().err
    monkeypatch.setattr(module, "run_in_root", built)
    made = ask([*sources, Path("tests/vm/run")])
    assert made is not None
    job = layer.Job(["true"], "dbus-broker", service=True)
    layer.write_layer(tmp_path / "tar", job, sources, made[1], "6.0", made)
    with tarfile.open(tmp_path / "tar") as tar:
        tar.extractall(tmp_path / "guest", filter="fully_trusted")
    there = tmp_path / "guest/src" / module.FOLDER
    found = tmp_path / "guest" / module.BUILT / module.sources_digest(there.iterdir()) / module.NAME
    assert found.read_bytes() == (there / "udmabuf_cache.c").read_bytes()
    assert ask([Path("tests/vm/run")]) is None
