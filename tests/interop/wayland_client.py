# SPDX-License-Identifier: MIT
"""The demo's client: two buffers from udmabufd, drawn by the CPU, shown by a Wayland compositor as dma-bufs.

Fills the screen with an XR24 buffer and puts an NV12 buffer on it as a subsurface. Runs as any user; for each step it
writes a line of JSON to stdout, the last when both are on the screen, and ends when its stdin does. The picture is
picture.py's; starting, looking and judging are demo.py's.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import select
import struct
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from pywayland.client import Display
from pywayland.protocol.linux_dmabuf_v1 import ZwpLinuxDmabufV1
from pywayland.protocol.presentation_time import WpPresentation
from pywayland.protocol.wayland import WlCompositor, WlSubcompositor
from pywayland.protocol.xdg_shell import XdgWmBase

from tests.interop.picture import Picture, draw
from udmabufd_client.contract import Kind
from udmabufd_client.errors import UdmabufError
from udmabufd_client.sync import Buffer, Client

DEVICE = Path("/dev/udmabuf")
LINEAR = 0
PATIENCE = 60.0
"""Seconds that one answer of the compositor may take; an emulated machine is slow."""

DMABUF_WITH_MODIFIERS = 3
"""The version of zwp_linux_dmabuf_v1 that lists formats with modifiers as events (4 has a table in a file)."""


class DemoError(Exception):
    """Something that keeps the picture from the screen; the text says what, and what to do."""


@dataclass(frozen=True)
class Inset:
    """Where the NV12 buffer lies on the screen, in pixels."""

    width: int
    height: int
    x: int
    y: int


class Screen:
    """A connection to a compositor: what it offers, and the wait for its answers.

    Callbacks only take down what they are told: an exception in one would be swallowed by pywayland.
    """

    def __init__(self, display: str) -> None:
        self._display = Display(display)
        try:
            self._display.connect()
        except ValueError:
            raise DemoError(f"no compositor answers at {display}, or this user may not connect to it") from None
        self._globals: dict[str, Any] = {}
        self._modifiers: dict[str, set[int]] = {}
        # pywayland looks for the registry whenever an event brings a new object: it has to stay.
        self._registry = self._display.get_registry()
        self._registry.dispatcher["global"] = self._offered
        self._display.roundtrip()
        self.compositor = self._need("wl_compositor")
        self.subcompositor = self._need("wl_subcompositor")
        self.shell = self._need("xdg_wm_base")
        self.presentation = self._need("wp_presentation")
        self.dmabuf = self._need("zwp_linux_dmabuf_v1")
        self.shell.dispatcher["ping"] = lambda shell, serial: shell.pong(serial)
        self.dmabuf.dispatcher["modifier"] = self._modifier
        self._display.roundtrip()

    def close(self) -> None:
        """End the connection."""
        self._display.disconnect()

    def modifiers(self, fourcc: str) -> list[int]:
        """The modifiers with which the compositor takes dma-bufs of this fourcc."""
        return sorted(self._modifiers.get(fourcc, ()))

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Send and receive until `done`. Raises DemoError, naming `what` was awaited, when it takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not done():
            if not self.turn([], max(0.0, deadline - time.monotonic())):
                raise DemoError(f"the compositor did not answer within {PATIENCE:.0f} s: {what}; its log may say why")

    def turn(self, others: list[int], timeout: float | None) -> list[int]:
        """Send what is queued, wait for the compositor or `others`, take what came; return the readable ones."""
        try:
            self._display.dispatch(block=False)
            self._display.flush()
            own = self._display.get_fd()
            ready, _, _ = select.select([own, *others], [], [], timeout)
            if own in ready:
                self._display.dispatch(block=True)
        except RuntimeError as error:
            raise DemoError(f"the compositor ended the connection ({error}); its log says why") from error
        return ready

    def buffer(self, buffer: Buffer) -> Any:
        """Return a wl_buffer that is `buffer`: all planes of its one descriptor. Raises DemoError."""
        info = buffer.info
        assert info.format is not None
        assert info.width is not None
        assert info.height is not None
        modifier = info.modifier or LINEAR
        answer: list[Any] = []
        parameters = self.dmabuf.create_params()
        parameters.dispatcher["created"] = lambda _, made: answer.append(made)
        parameters.dispatcher["failed"] = lambda _: answer.append(None)
        for plane in buffer.planes:
            parameters.add(
                buffer.fileno(), plane.index, plane.offset, plane.stride, modifier >> 32, modifier & 0xFFFFFFFF
            )
        parameters.create(info.width, info.height, fourcc_code(info.format), 0)
        self.until(lambda: bool(answer), f"the import of {info.name}")
        parameters.destroy()
        if answer[0] is None:
            raise DemoError(f"the compositor refused the dma-buf {info.name} ({info.format}); its log may say why")
        return answer[0]

    def _offered(self, registry: Any, number: int, interface: str, version: int) -> None:
        wanted = {
            "wl_compositor": (WlCompositor, 4),
            "wl_subcompositor": (WlSubcompositor, 1),
            "xdg_wm_base": (XdgWmBase, 1),
            "wp_presentation": (WpPresentation, 1),
            "zwp_linux_dmabuf_v1": (ZwpLinuxDmabufV1, DMABUF_WITH_MODIFIERS),
        }
        if interface in wanted and version >= wanted[interface][1]:
            self._globals[interface] = registry.bind(number, *wanted[interface])

    def _need(self, interface: str) -> Any:
        if interface not in self._globals:
            raise DemoError(f"the compositor has no {interface}: is it Weston with --renderer=gl?")
        return self._globals[interface]

    def _modifier(self, _: Any, code: int, high: int, low: int) -> None:
        self._modifiers.setdefault(struct.pack("<I", code).decode("latin-1"), set()).add(high << 32 | low)


class Window:
    """A toplevel with one subsurface, shown by a shell that gives it the whole screen."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self.width = self.height = 0
        self._serials: list[int] = []
        self._surface = screen.compositor.create_surface()
        self._xdg_surface = screen.shell.get_xdg_surface(self._surface)
        self._xdg_surface.dispatcher["configure"] = self._configure
        self._toplevel = self._xdg_surface.get_toplevel()
        self._toplevel.dispatcher["configure"] = self._resize
        self._toplevel.set_app_id("udmabufd-demo")
        self._surface.commit()
        screen.until(lambda: bool(self._serials), "the size of the window")
        self._xdg_surface.ack_configure(self._serials[-1])

    def show(self, picture: Any, inset_picture: Any, inset: Inset) -> None:
        """Show two wl_buffers and wait until the compositor says that both are on the screen. Raises DemoError."""
        child = self._screen.compositor.create_surface()
        position = self._screen.subcompositor.get_subsurface(child, self._surface)
        position.set_position(inset.x, inset.y)
        told: dict[str, str] = {}
        for name, surface, buffer in (("inset", child, inset_picture), ("window", self._surface, picture)):
            surface.attach(buffer, 0, 0)
            surface.damage_buffer(0, 0, 2**31 - 1, 2**31 - 1)
            feedback = self._screen.presentation.feedback(surface)
            feedback.dispatcher["presented"] = lambda *_, name=name: told.update({name: "presented"})
            feedback.dispatcher["discarded"] = lambda *_, name=name: told.update({name: "discarded"})
            surface.commit()
        self._screen.until(lambda: len(told) == 2, "the presentation of the picture")
        if set(told.values()) != {"presented"}:
            raise DemoError(f"the compositor did not show the picture: {told}")

    def _configure(self, _: Any, serial: int) -> None:
        self._serials.append(serial)

    def _resize(self, _: Any, width: int, height: int, states: Any) -> None:
        self.width, self.height = width, height


def fourcc_code(fourcc: str) -> int:
    """Return the number that stands for a fourcc in drm_fourcc.h."""
    code: int = struct.unpack("<I", fourcc.encode("ascii"))[0]
    return code


def tell(event: str, **facts: Any) -> None:
    """Report a step to whoever started this client."""
    print(json.dumps({"event": event, **facts}), flush=True)


def fail(message: str) -> NoReturn:
    """End in failure; the reason goes the same way as the steps."""
    tell("failed", reason=message)
    sys.exit(1)


def show_that_device_is_closed() -> None:
    """Make sure that this user could not have made the dma-bufs itself."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EACCES:
            raise DemoError(f"{DEVICE}: {error.strerror}, where permission denied was expected") from error
        tell("refused", device=str(DEVICE), uid=os.getuid(), errno=errno.errorcode[error.errno])
    else:
        os.close(fd)
        raise DemoError(f"uid {os.getuid()} may open {DEVICE} itself: run the demo as a user who may not")


def allocate(client: Client, picture: Picture, fourcc: str, width: int, height: int, name: str) -> Buffer:
    """Allocate a buffer and draw the picture into it."""
    buffer = client.allocate(width=width, height=height, format=fourcc, name=name)
    info = buffer.info
    if info.kind != Kind.DMA_BUF:
        buffer.close()
        raise DemoError(f"the service gave a {info.kind} for {name}, not a dma-buf")
    with buffer.cpu_access(read=False, write=True) as view:
        draw(view, buffer.planes, picture.planes(fourcc, width, height), np.random.default_rng())
    tell("drawn", path=buffer.path, **info.as_dict())
    return buffer


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Show a picture in dma-bufs from udmabufd on a Wayland compositor.")
    parser.add_argument("--display", required=True, help="the compositor's socket")
    parser.add_argument("--bus", default="system", help="the bus of the service (default: system)")
    parser.add_argument("--seed", required=True, help="16 hexadecimal digits that the picture is drawn from")
    parser.add_argument("--inset", required=True, type=int, nargs=4, metavar=("WIDTH", "HEIGHT", "X", "Y"))
    return parser.parse_args(argv)


def main() -> None:
    """Allocate, draw, show, wait for the end."""
    options = parse(sys.argv[1:])
    picture = Picture.from_seed(options.seed)
    inset = Inset(*options.inset)
    tag = options.seed[:8]
    with ExitStack() as stack:
        show_that_device_is_closed()
        screen = Screen(options.display)
        stack.callback(screen.close)
        offers = {fourcc: screen.modifiers(fourcc) for fourcc in ("XR24", "NV12")}
        for fourcc, modifiers in offers.items():
            if LINEAR not in modifiers:
                raise DemoError(f"the compositor takes no linear {fourcc} dma-bufs: is it Weston with --renderer=gl?")
        window = Window(screen)
        tell("connected", width=window.width, height=window.height, modifiers=offers)
        client = stack.enter_context(Client.connect(options.bus))
        xr24 = allocate(client, picture, "XR24", window.width, window.height, f"demo-xr24-{tag}")
        stack.enter_context(xr24)
        nv12 = allocate(client, picture, "NV12", inset.width, inset.height, f"demo-nv12-{tag}")
        stack.enter_context(nv12)
        window.show(screen.buffer(xr24), screen.buffer(nv12), inset)
        tell("shown")
        stdin = sys.stdin.fileno()
        while not (stdin in screen.turn([stdin], None) and not os.read(stdin, 1)):
            pass
    tell("ended")


if __name__ == "__main__":
    try:
        main()
    except (DemoError, UdmabufError) as error:
        fail(str(error))
