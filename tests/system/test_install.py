# SPDX-License-Identifier: MIT
"""systemd/install into a folder of its own: what it leaves there, what it takes away, and what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.unit.tools import TOP

pytestmark = pytest.mark.host
"""The guest has no package index; it runs what this script installed."""

PYTHON = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable

DATABASE = {f"/usr/lib/udmabufd/devices.d/{path.name}" for path in (TOP / "systemd/constraints").glob("*.toml")}
"""Where the daemon looks for it, whatever the prefix."""

SERVICE_FILES = {
    "/usr": {
        *DATABASE,
        "/usr/bin/udmabufctl",
        "/usr/lib/systemd/catalog/udmabufd.catalog",
        "/usr/lib/systemd/system/udmabufd.service",
        "/usr/lib/systemd/system/udmabufd.slice",
        "/usr/lib/sysusers.d/udmabufd.conf",
        "/usr/lib/udev/rules.d/00-udmabufd-heaps.rules",
        "/usr/lib/udev/rules.d/51-udmabufd.rules",
        "/usr/lib/udmabufd/udmabufd",
        "/usr/lib/udmabufd/udmabufd.toml",
        "/usr/share/dbus-1/interfaces/org.udmabufd.Admin1.xml",
        "/usr/share/dbus-1/interfaces/org.udmabufd.Allocator1.xml",
        "/usr/share/dbus-1/interfaces/org.udmabufd.Buffer1.xml",
        "/usr/share/dbus-1/system-services/org.udmabufd.Allocator1.service",
        "/usr/share/dbus-1/system.d/org.udmabufd.Allocator1.conf",
        "/usr/share/man/man1/udmabufctl.1",
        "/usr/share/man/man5/org.udmabufd.Allocator1.5",
        "/usr/share/man/man5/udmabufd.devices.5",
        "/usr/share/man/man5/udmabufd.toml.5",
        "/usr/share/man/man8/udmabufd.8",
        "/usr/share/polkit-1/actions/org.udmabufd.policy",
    },
    "/opt/dma": {
        *DATABASE,
        "/etc/dbus-1/system.d/org.udmabufd.Allocator1.conf",
        "/etc/systemd/system/udmabufd.service",
        "/etc/systemd/system/udmabufd.slice",
        "/etc/sysusers.d/udmabufd.conf",
        "/etc/udev/rules.d/00-udmabufd-heaps.rules",
        "/etc/udev/rules.d/51-udmabufd.rules",
        "/opt/dma/bin/udmabufctl",
        "/opt/dma/lib/udmabufd/udmabufd",
        "/opt/dma/lib/udmabufd/udmabufd.toml",
        "/opt/dma/share/dbus-1/interfaces/org.udmabufd.Admin1.xml",
        "/opt/dma/share/dbus-1/interfaces/org.udmabufd.Allocator1.xml",
        "/opt/dma/share/dbus-1/interfaces/org.udmabufd.Buffer1.xml",
        "/opt/dma/share/man/man1/udmabufctl.1",
        "/opt/dma/share/man/man5/org.udmabufd.Allocator1.5",
        "/opt/dma/share/man/man5/udmabufd.devices.5",
        "/opt/dma/share/man/man5/udmabufd.toml.5",
        "/opt/dma/share/man/man8/udmabufd.8",
        "/usr/lib/systemd/catalog/udmabufd.catalog",
        "/usr/local/share/dbus-1/system-services/org.udmabufd.Allocator1.service",
        "/usr/share/polkit-1/actions/org.udmabufd.policy",
    },
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is installed, so that a test may take pieces away."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, folder)
    for name in ("daemon", "client", "systemd"):
        shutil.copytree(TOP / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def install(source: Path, destdir: Path | None, *arguments: str, python: str = PYTHON) -> tuple[int, str]:
    """Run the script; return its exit status and what it says."""
    environ = {**os.environ, "PYTHON": python}
    environ.pop("DESTDIR", None)
    if destdir is not None:
        environ["DESTDIR"] = str(destdir)
    done = subprocess.run(
        [source / "systemd/install", *arguments],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def tree(folder: Path) -> set[str]:
    """Return every file and folder below, seen from there."""
    return {f"/{path.relative_to(folder)}" for path in folder.rglob("*")}


@pytest.mark.parametrize("prefix", SERVICE_FILES)
def test_what_is_installed_works_and_is_removed_again(source: Path, tmp_path: Path, prefix: str) -> None:
    assert DATABASE
    # Some of it is there before, and some of that is nobody's to remove.
    destdir = tmp_path / "root"
    other = destdir / prefix.lstrip("/") / "lib/other/file"
    other.parent.mkdir(parents=True)
    other.write_text("not ours")
    before = tree(destdir)

    for attempt in ("install", "upgrade"):
        status, said = install(source, destdir, f"--prefix={prefix}")
        assert status == 0, f"{attempt}: {said}"
        files = {path for path in tree(destdir) if (destdir / path.lstrip("/")).is_file()}
        ours = {path for path in files - before if not path.startswith(f"{prefix}/lib/udmabufd/python/")}
        (path_file,) = (path for path in ours if path.endswith("/udmabufd.pth"))
        assert ours - {path_file, f"{prefix}/lib/udmabufd/manifest"} == SERVICE_FILES[prefix]

    # Nothing names the folder that it was put together in, but what Python compiled.
    for path in ours:
        assert str(destdir) not in (destdir / path.lstrip("/")).read_text(), path
        assert "@PREFIX@" not in (destdir / path.lstrip("/")).read_text(), path
    assert (destdir / path_file.lstrip("/")).read_text() == f"{prefix}/lib/udmabufd/python\n"
    (unit,) = (path for path in ours if path.endswith(".service") and "systemd" in path)
    assert f"\nExecStart={prefix}/lib/udmabufd/udmabufd\n" in (destdir / unit.lstrip("/")).read_text()

    for command in (f"{prefix}/bin/udmabufctl", f"{prefix}/lib/udmabufd/udmabufd"):
        installed = destdir / command.lstrip("/")
        assert os.access(installed, os.X_OK)
        # As it would run there, from the folder that stands for the root.
        program = tmp_path / "program"
        program.write_text(installed.read_text().replace(f'"{prefix}/', f'"{destdir}{prefix}/'))
        program.chmod(0o755)
        shown = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stderr
        assert "usage:" in shown.stdout

    stranger = destdir / prefix.lstrip("/") / "share/dbus-1/interfaces/org.example.Other.xml"
    stranger.write_text("not ours either")
    status, said = install(source, destdir, f"--prefix={prefix}", "--uninstall")
    assert status == 0, said
    left = tree(destdir)
    assert {path for path in left - before if (destdir / path.lstrip("/")).is_file()} == {
        f"{prefix}/share/dbus-1/interfaces/org.example.Other.xml"
    }
    stranger.unlink()
    assert (left - before) - {f"{prefix}{end}" for end in STRANGERS_FOLDERS} == set()


STRANGERS_FOLDERS = (
    "/share",
    "/share/dbus-1",
    "/share/dbus-1/interfaces",
    "/share/dbus-1/interfaces/org.example.Other.xml",
)


def test_an_upgrade_removes_what_is_no_longer_shipped(source: Path, tmp_path: Path) -> None:
    destdir = tmp_path / "root"
    assert install(source, destdir)[0] == 0
    manifest = destdir / "usr/lib/udmabufd/manifest"
    old = destdir / "usr/share/dbus-1/interfaces/org.udmabufd.Old1.xml"
    old.write_text("<node/>")
    manifest.write_text(f"{manifest.read_text()}file /usr/share/dbus-1/interfaces/{old.name}\n")
    assert install(source, destdir)[0] == 0
    assert not old.exists()
    assert old.name not in manifest.read_text()
    assert install(source, destdir, "--uninstall")[0] == 0
    assert tree(destdir) == set()


def test_a_failure_can_be_removed(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "source"
    shutil.copytree(source, broken)
    (broken / "systemd/man/udmabufd.8.md").write_text("@nonesuch@\n")
    destdir = tmp_path / "root"
    status, said = install(broken, destdir)
    assert status != 0
    assert "manual pages could not be made" in said
    assert tree(destdir) != set()
    assert install(broken, destdir, "--uninstall")[0] == 0
    assert tree(destdir) == set()


def test_a_failure_of_pip_changes_nothing(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "source"
    shutil.copytree(source, broken)
    (broken / "pyproject.toml").write_text((source / "pyproject.toml").read_text() + "\n[project.urls]\nx = 1\n")
    destdir = tmp_path / "root"
    assert install(source, destdir)[0] == 0
    before = {path: (destdir / path.lstrip("/")).stat().st_mtime_ns for path in tree(destdir)}
    lib = destdir / "usr/lib/udmabufd"
    status, said = install(broken, destdir)
    assert status != 0
    assert "pip could not install" in said
    after = {path: (destdir / path.lstrip("/")).stat().st_mtime_ns for path in tree(destdir)}
    before.pop(f"/{lib.relative_to(destdir)}")  # the staging folder was made and removed in it
    after.pop(f"/{lib.relative_to(destdir)}")
    assert after == before

    # The first time, too.
    first = tmp_path / "new/root"
    status, said = install(broken, first)
    assert status != 0
    assert "pip could not install" in said
    assert not first.parent.exists()


def test_an_upgrade_keeps_the_python_prctl_that_was_compiled(source: Path, tmp_path: Path) -> None:
    # A system's Python without python-prctl, but with our path file.
    destdir = tmp_path / "root"
    modules = destdir / "usr/lib/udmabufd/python"
    subprocess.run([PYTHON, "-m", "venv", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv/lib").glob("python3*/site-packages")
    (site / "udmabufd.pth").write_text(f"{modules}\n")
    python = str(tmp_path / "venv/bin/python3")
    has_prctl = [python, "-I", "-c", "import prctl"]
    assert subprocess.run(has_prctl, stderr=subprocess.DEVNULL, check=False).returncode == 1
    for attempt in ("install", "upgrade"):
        status, said = install(source, destdir, python=python)
        assert status == 0, f"{attempt}: {said}"
        assert list(modules.glob("_prctl.*.so")), attempt
        assert subprocess.run(has_prctl, check=False).returncode == 0, attempt


def contents(folder: Path) -> dict[str, bytes]:
    """Return what is in every file below."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_installation_of_another_prefix_is_left_alone(source: Path, tmp_path: Path) -> None:
    destdir = tmp_path / "root"
    assert install(source, destdir, "--prefix=/opt/one")[0] == 0
    before, paths = contents(destdir), tree(destdir)
    status, said = install(source, destdir, "--prefix=/opt/two")
    assert status == 1
    shared = {path for path in SERVICE_FILES["/opt/dma"] if not path.startswith("/opt/")}
    named = {line.strip().removeprefix(str(destdir)) for line in said.splitlines() if line.startswith("    ")}
    assert {path for path in named if not path.endswith("/udmabufd.pth")} == shared
    assert len(named) == len(shared) + 1
    assert "--prefix=DIR --uninstall" in said
    assert "Nothing was changed" in said
    assert contents(destdir) == before
    assert tree(destdir) == paths

    assert install(source, destdir, "--prefix=/opt/one", "--uninstall")[0] == 0
    status, said = install(source, destdir, "--prefix=/opt/two")
    assert status == 0, said


@pytest.mark.parametrize("kind", ["file", "dangling link", "modules"])
def test_what_is_not_ours_is_not_replaced(source: Path, tmp_path: Path, kind: str) -> None:
    destdir = tmp_path / "root"
    foreign = destdir / ("usr/lib/udmabufd/python" if kind == "modules" else "usr/share/man/man8/udmabufd.8")
    foreign.parent.mkdir(parents=True)
    if kind == "modules":
        foreign.mkdir()
    elif kind == "file":
        foreign.write_text("a package's")
    else:
        foreign.symlink_to("nowhere")
    before = tree(destdir)
    status, said = install(source, destdir)
    assert status == 1
    assert f"    {foreign}\n" in said
    assert tree(destdir) == before


@pytest.mark.parametrize("then", ["install", "upgrade", "uninstall"])
def test_an_installation_that_was_cut_off(source: Path, tmp_path: Path, then: str) -> None:
    # Killed when half of the files are there; `upgrade`: one that was to replace an earlier installation.
    destdir = tmp_path / "root"
    if then == "upgrade":
        assert install(source, destdir)[0] == 0
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\ncase "$*" in *generate.py*) kill -KILL $PPID;; esac\nexec {PYTHON} "$@"\n')
    python.chmod(0o755)
    status, _ = install(source, destdir, python=str(python))
    assert status == -signal.SIGKILL
    assert (destdir / "usr/lib/systemd/system/udmabufd.service").exists()
    if then != "uninstall":
        status, said = install(source, destdir)
        assert status == 0, said
        assert (destdir / "usr/share/man/man8/udmabufd.8").exists()
    status, said = install(source, destdir, "--uninstall")
    assert status == 0, said
    assert tree(destdir) == set()


@pytest.mark.parametrize("prefix", ["", "relative", "/", "/a b", "/a/../b", "/a'b", "/a|b", "/a//b", "/a\nb"])
def test_an_unusable_prefix_is_refused(source: Path, tmp_path: Path, prefix: str) -> None:
    status, said = install(source, tmp_path / "root", f"--prefix={prefix}")
    assert status == 1
    assert "--prefix must be an absolute path" in said
    assert not (tmp_path / "root").exists()


def test_what_is_missing_is_named_with_the_command_that_gets_it(source: Path, tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\ncase "$*" in *pip*|*prctl*) exit 1;; esac\nexec {PYTHON} "$@"\n')
    python.chmod(0o755)
    status, said = install(source, tmp_path / "root", python=str(python))
    assert status == 1
    assert "apt-get install python3-pip" in said
    status, said = install(source, tmp_path / "root", python=str(tmp_path / "absent"))
    assert status == 1
    assert "Python 3.11 or later" in said
    assert "apt-get install python3\n" in said
    assert not (tmp_path / "root").exists()


def test_unknown_arguments_and_help(source: Path, tmp_path: Path) -> None:
    assert install(source, tmp_path / "root", "--frobnicate")[0] == 1
    status, said = install(source, tmp_path / "root", "--help")
    assert status == 0
    assert "--uninstall" in said
    status, said = install(source, tmp_path / "root", "--uninstall")
    assert status == 1
    assert "nothing is installed" in said
    assert not (tmp_path / "root").exists()


def test_without_destdir_root_is_asked_for() -> None:
    # As nobody, who must be able to read the script.
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "systemd/install"
        script.parent.mkdir()
        shutil.copy(TOP / "systemd/install", script)
        Path(folder).chmod(0o755)
        as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [*as_nobody, script],
            env={"PATH": os.environ["PATH"], "PYTHON": PYTHON},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "run it as root" in done.stdout
