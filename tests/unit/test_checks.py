# SPDX-License-Identifier: MIT
"""Linters, types and the structure of the tree, as tests like the others."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.unit.tools import TOP, needed

IGNORED = {
    ".git",
    ".venv",
    "__pycache__",
    ".hypothesis",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "build",
    "dist",
}

NO_SPDX = {".gitignore", "COPYING", "LICENSE", "README.md", "py.typed"}
"""Text files that have no place for a comment, or are the licence themselves."""

GO_ON = {"tests/guest-suite"}
"""Scripts that go on after an error, and end with the status of the worst."""

MAX_LINES = 350
LONGER: dict[str, str] = {
    "client/udmabufd_client/contract.py": "every name that both ends share, in one place",
    "daemon/udmabufd/core/event_table.py": "one table, of which each row is prose",
}
"""Modules beyond MAX_LINES -> the reason why they stay in one piece."""


@cache
def files() -> tuple[Path, ...]:
    """Return every file of the tree that is not made by a tool."""
    found = []
    for folder, folders, names in os.walk(TOP):
        folders[:] = sorted(name for name in folders if name not in IGNORED and not name.endswith(".egg-info"))
        # Of a linked work tree `.git` is a file.
        found += [Path(folder) / name for name in sorted(names) if name not in IGNORED]
    return tuple(found)


def first_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.readline().decode("utf-8", "replace")


def of_language(suffix: str, interpreter: str) -> list[Path]:
    """Return the sources of a language, by their names or by the interpreter that they name."""
    return [
        path
        for path in files()
        if path.suffix == suffix or (not path.suffix and re.match(rf"#!.*\b{interpreter}", first_line(path)))
    ]


def python_sources() -> list[Path]:
    return of_language(".py", "python")


def run(*command: str | Path, **environ: str) -> None:
    """Run a check and show what it says only where it finds something."""
    done = subprocess.run(
        [needed(str(command[0])), *command[1:]],
        cwd=TOP,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command[:3]))} ...\n{done.stdout}{done.stderr}", pytrace=False)


# ---- linters ------------------------------------------------------------------------------------------------------


def test_ruff() -> None:
    run("ruff", "check", *python_sources())


def test_format() -> None:
    run("ruff", "format", "--check", "--diff", *python_sources())


def test_types() -> None:
    run("mypy", "--strict", "daemon", "client")


def test_types_of_the_tests() -> None:
    run("mypy", "--exclude", "^tests/tiers.py$", "tests")


def test_types_of_what_runs_the_tests() -> None:
    # A script: its imports begin at its own folder.
    run("mypy", "tests/tiers.py", MYPYPATH="tests")


def test_types_of_the_manuals_generator() -> None:
    path = os.pathsep.join(["daemon", "client", "systemd/man"])
    run("mypy", "--strict", *sorted(path for path in (TOP / "systemd/man").glob("*.py")), MYPYPATH=path)


def test_spelling() -> None:
    # Debian 12's codespell does not read pyproject.toml itself.
    settings = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["codespell"]
    ignored = settings.get("ignore-words-list", "")
    checked = [path for path in files() if path.suffix not in {".png", ".whl"} and path.name != "pyproject.toml"]
    run("codespell", f"--ignore-words-list={ignored}", *checked)


def test_shell_scripts() -> None:
    scripts = of_language(".sh", "(ba)?sh")
    assert TOP / "systemd/install" in scripts
    # SC2187 only says that busybox's sh is taken for dash: that is meant.
    run("shellcheck", "--exclude=SC2187", *scripts)
    for script in scripts:
        if "bash" in first_line(script):
            options = "-uo" if str(script.relative_to(TOP)) in GO_ON else "-euo"
            assert f"\nset {options} pipefail\n" in script.read_text(), f"{script} goes on after errors"


def test_each_file_names_its_licence() -> None:
    for path in files():
        if path.name not in NO_SPDX and path.suffix != ".md":
            head = path.read_bytes()[:600]
            # The kernel lends what a module needs to the GPL alone.
            licence = b"GPL-2.0-only" if path == TOP / "tests/module/udmabuf_cache.c" else b"MIT"
            assert b"\0" in head or b"SPDX-License-Identifier: " + licence in head, f"{path} names no licence"


def test_each_module_says_what_it_is() -> None:
    for path in python_sources():
        tree = ast.parse(path.read_text())
        if tree.body:
            assert ast.get_docstring(tree), f"{path} has no docstring"


def test_modules_are_short() -> None:
    long = {
        str(path.relative_to(TOP)): lines
        for path in python_sources()
        if (lines := len(path.read_text().splitlines())) > MAX_LINES and path.relative_to(TOP).parts[0] != "tests"
    }
    assert long.keys() == LONGER.keys(), long


def test_the_top_level_stays_small() -> None:
    shown = {path.relative_to(TOP).parts[0] for path in files()}
    expected = {"daemon", "client", "systemd", "tests", "pyproject.toml", "README.md", "LICENSE"}
    assert {name for name in shown if not name.startswith(".")} == expected


# ---- import direction -----------------------------------------------------------------------------------------------


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of each module that a source imports, and of each name that it takes from one."""
    package = path.relative_to(TOP).with_suffix("").parts[1:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, *allowed: str) -> bool:
    """Return whether a dotted name is one of those, in one of them, or a package on the way to one."""
    return any(name == one or name.startswith(f"{one}.") or one.startswith(f"{name}.") for one in allowed)


OURS = ("udmabufd", "udmabufd_base", "udmabufd_client", "tests")
BASE_FOR_KERNEL = ("udmabufd_base.fd", "udmabufd_base.dmabuf_sync")
CONTRACT = ("udmabufd_client.contract",)

ALLOWED: dict[str, tuple[str, ...]] = {
    "daemon/udmabufd/linux": ("udmabufd.linux", *BASE_FOR_KERNEL),
    "daemon/udmabufd/core": ("udmabufd.core", "udmabufd.linux", *BASE_FOR_KERNEL, *CONTRACT),
    "daemon/udmabufd/bus": ("udmabufd.bus", "udmabufd.core", "udmabufd_base", *CONTRACT),
    "daemon/udmabufd/system": ("udmabufd.system", "udmabufd.core", "udmabufd.linux", "udmabufd_base.fd", *CONTRACT),
    "daemon/udmabufd": ("udmabufd", "udmabufd_base", *CONTRACT),
    "client/udmabufd_base": ("udmabufd_base",),
    "client/udmabufd_client": ("udmabufd_client", "udmabufd_base"),
}
"""Folder -> which of our own modules what is in it may import; the longest folder that fits counts."""

FOREIGN: dict[str, tuple[str, ...]] = {
    "dbus_next": ("client/udmabufd_base/codec.py",),
    "dbus_fast": ("client/udmabufd_base/codec.py",),
    "pyudev": ("daemon/udmabufd/system/udev.py",),
    "prctl": ("daemon/udmabufd/linux/prctl.py",),
    "numpy": ("client/udmabufd_client/integrations.py",),
}
"""What is not of the standard library -> the modules that may import it."""


def folder_of(path: Path) -> str:
    relative = str(path.relative_to(TOP))
    return max((folder for folder in ALLOWED if relative.startswith(f"{folder}/")), key=len)


def shipped() -> list[Path]:
    return [path for path in python_sources() if path.relative_to(TOP).parts[0] in {"daemon", "client"}]


def test_imports_run_one_way() -> None:
    seen = set()
    for path in shipped():
        folder = folder_of(path)
        seen.add(folder)
        for name in imports(path):
            # `from udmabufd.linux import memfd` yields the package, too: on the way to something allowed.
            if within(name, *OURS):
                assert within(name, *ALLOWED[folder]), f"{path.relative_to(TOP)} imports {name}"
    assert seen == ALLOWED.keys()


def test_foreign_modules_have_one_door_each() -> None:
    for path in shipped():
        relative = str(path.relative_to(TOP))
        for name in imports(path):
            top = name.split(".")[0]
            if top and top not in OURS and top not in sys.stdlib_module_names:
                assert relative in FOREIGN.get(top, ()), f"{relative} imports {name}"


def test_nothing_that_is_shipped_imports_tests() -> None:
    for path in [*shipped(), *(TOP / "systemd/man").glob("*.py")]:
        assert not any(within(name, "tests") for name in imports(path)), path


@pytest.mark.parametrize(
    ("folder", "source", "fits"),
    [
        ("linux", "import os", True),
        ("linux", "from udmabufd.core import ledger", False),
        ("linux", "from ..core.ledger import Ledger", False),
        ("linux", "from udmabufd_base.fd import OwnedFd", True),
        ("linux", "from udmabufd_base import connection", False),
        ("core", "from udmabufd.linux import memfd", True),
        ("core", "from udmabufd.bus.server import Server", False),
        ("core", "from udmabufd import bus", False),
        ("system", "from udmabufd.bus import server", False),
        ("bus", "from udmabufd_client import contract", True),
        ("bus", "from udmabufd_client import aio", False),
        ("bus", "def f():\n    import udmabufd_client.aio", False),
    ],
)
def test_the_check_of_imports_can_fail(folder: str, source: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = TOP / "daemon/udmabufd" / folder / "example.py"
    monkeypatch.setattr(Path, "read_text", lambda _: source)
    ours = [name for name in imports(path) if within(name, *OURS)]
    assert all(within(name, *ALLOWED[folder_of(path)]) for name in ours) is fits
