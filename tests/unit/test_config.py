# SPDX-License-Identifier: MIT
"""Configuration files: precedence, drop-ins, and errors that name file and key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from udmabufd.config import OPTIONS, Config, ConfigError, load


@pytest.fixture
def directories(tmp_path: Path) -> list[Path]:
    """/etc, /run and /usr/lib of a test, in that order."""
    return [tmp_path / name for name in ("etc", "run", "lib")]


def write(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_files_everything_has_its_default(directories: list[Path]) -> None:
    assert load(directories=directories) == Config()


def test_the_first_main_file_counts_and_drop_ins_follow_in_order_of_their_names(directories: list[Path]) -> None:
    etc, run, lib = directories
    write(lib, "udmabufd.toml", "[limits]\nmax_buffers = 1\nmax_buffers_per_user = 1\n")
    write(run, "udmabufd.toml", "[limits]\nmax_buffers = 2\n")
    write(lib, "udmabufd.toml.d/20-b.toml", "[limits]\nmax_calls_per_window = 20\n")
    write(etc, "udmabufd.toml.d/10-a.toml", "[limits]\nmax_calls_per_window = 10\ncall_window_usec = 5000\n")
    limits = load(directories=directories).limits
    assert limits.max_buffers == 2
    assert limits.max_buffers_per_user == Config().limits.max_buffers_per_user
    assert (limits.max_calls_per_window, limits.call_window_usec) == (20, 5000)


def test_a_drop_in_in_etc_hides_its_namesake(directories: list[Path]) -> None:
    etc, _, lib = directories
    write(lib, "udmabufd.toml.d/10-a.toml", "[limits]\nmax_buffers = 7\n")
    write(etc, "udmabufd.toml.d/10-a.toml", "")
    assert load(directories=directories) == Config()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[limits]\nmax_bufers = 1\n", "'max_bufers' is not one of the keys of"),
        ("[limit]\nmax_buffers = 1\n", "'limit' is not one of the sections"),
        ("limits = 1\n", "'limits' is not one of the sections"),
        ("[limits]\nmax_buffers = 0\n", "max_buffers must be 1 to 1000000 buffers, not 0"),
        ("[limits]\nmax_buffers = true\n", "max_buffers must be of type int"),
        ("[limits]\nmax_buffers = '5'\n", "max_buffers must be of type int"),
        ("[limits\n", "Expected"),
        ("[allocators]\norder = 'memfd'\n", "order must be of type array of strings"),
        ("[allocators]\norder = ['memfd', 3]\n", "order is of allocators, such as 'udmabuf' or 'heap:*', not 3"),
        ("[allocators]\norder = ['udmabuf-4M']\n", "not 'udmabuf-4M'"),
        ("[allocators]\norder = ['wrapped']\n", "not 'wrapped'"),
        ("[allocators]\norder = ['heap:']\n", "not 'heap:'"),
        ("[allocators]\norder = ['memfd', 'udmabuf', 'memfd']\n", "order names 'memfd' more than once"),
        ("[heaps]\ncontiguous = ['a/b']\n", "contiguous is of globs, such as 'system*', not 'a/b'"),
        ("[heaps]\nsecure = ['x']\n", "'secure' is not one of the keys of [heaps]: system, contiguous"),
        ("[drm]\ncards = ['/dev/dri/card0']\n", "cards is of names of cards, such as 'card0', not '/dev/dri/card0'"),
        ("[drm]\ncards = ['renderD128']\n", "not 'renderD128'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_an_error_when_it_was_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "absent.toml")


def test_every_option_is_documented_and_bounded() -> None:
    for option in OPTIONS:
        assert option.doc.endswith(".")
        assert option.type is not int or (option.minimum is not None and option.maximum is not None)
        if isinstance(option.default, tuple):
            assert all(re.fullmatch(option.pattern, entry) for entry in option.default)


def test_arrays_replace_the_default(directories: list[Path]) -> None:
    etc, _, lib = directories
    write(lib, "udmabufd.toml", "[allocators]\norder = ['heap:system', 'memfd']\n[heaps]\ncontiguous = ['cma*']\n")
    write(etc, "udmabufd.toml.d/10-a.toml", "[allocators]\norder = ['dumb:*']\n[drm]\ncards = ['card0', 'card1']\n")
    config = load(directories=directories)
    assert config.allocators.order == ("dumb:*",)
    assert config.drm.cards == ("card0", "card1")
    assert config.heaps.contiguous == ("cma*",)
    assert config.heaps.system == Config().heaps.system


def test_a_folder_that_cannot_be_read_is_an_error(directories: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    # Root, as which tests run, may read everything.
    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(ConfigError, match="etc.*: Permission denied"):
        load(directories=directories)
