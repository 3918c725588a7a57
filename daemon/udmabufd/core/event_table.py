# SPDX-License-Identifier: MIT
"""The events that the journal is told of by a MESSAGE_ID: refusals, limits, recoveries, devices, with their meaning.

The one table of them: `events` logs by it, the journal's catalog is made from it. A MESSAGE_ID is a random number
(uuid4) that was made once and is never changed or used again. When an event happens is left to others.
"""

from __future__ import annotations

import logging
from enum import Enum
from typing import Final

NOTICE: Final = 25
"""The level of `logging` for what is normal but worth noting: syslog's notice."""

EACH: Final = True
"""Tell of each of these events: no user can cause it at will."""


class Event(Enum):
    """An event: MESSAGE_ID, level, subject, message, explanation, and whether each is told of or one a minute.

    The message has the fields of the event in braces, and `{who}` for user and application. Subject and explanation
    are the catalog's: @FIELD@ stands for a field of the entry, an empty line for the end of a paragraph.
    """

    def __init__(
        self, message_id: str, level: int, subject: str, message: str, explanation: str, each: bool = False
    ) -> None:
        self.message_id = message_id
        self.level = level
        self.subject = subject
        self.message = message
        self.explanation = "\n\n".join(" ".join(part.split()) for part in explanation.split("\n\n"))
        self.each = each

    # Refusals

    QUOTA_EXCEEDED = (
        "51edc689a59d4f6784595ba08e56650f",
        NOTICE,
        "A user has reached its limit of memory or buffers",
        "Refused {member} of {who}: {reason}",
        """The user @UDMABUFD_UID@ would have held more than a limit of udmabufd.toml(5) allows; the message names the
        limit and the present figure. Nothing was allocated.

        Memory counts until the kernel has freed it: a buffer that was released, and that another process still has
        open, mapped or imported, is charged on. udmabufctl top shows who holds how much, udmabufctl list --all every
        buffer.""",
    )
    RATE_LIMITED = (
        "be89df15ce1845b8875133fd270bb911",
        NOTICE,
        "A user makes calls faster than its limit allows",
        "Refused {member} of {who}: {reason}",
        """The user @UDMABUFD_UID@ has made too many calls, has too many of them under way, or does not read the
        answers. The call had no effect and can be repeated later. The limits are max_calls_per_window and
        max_calls_in_flight_per_user of udmabufd.toml(5).""",
    )
    OUT_OF_MEMORY = (
        "19ae5c24f0b748be9ae320c575b9c8da",
        logging.WARNING,
        "A buffer was refused for want of memory",
        "Refused {member} of {who}: {reason}",
        """There was no memory, or no file descriptor, for what the user @UDMABUFD_UID@ asked for; the message says
        which. The memory of buffers is charged to udmabufd.slice, but for huge pages, heaps and wrapped memfds, and
        cannot be swapped out.

        To give the service more, raise MemoryMax= and MemoryHigh= of udmabufd.slice in a drop-in (systemctl edit
        udmabufd.slice), or LimitNOFILE= of udmabufd.service for file descriptors. To give each user less, lower
        max_bytes_per_user in udmabufd.toml(5). udmabufctl top shows who holds how much, udmabufctl list --all every
        buffer.""",
    )
    KERNEL_LIMIT = (
        "34857fee91de48a18275368f4a70ee8f",
        NOTICE,
        "A parameter of the kernel's udmabuf driver forbids a buffer",
        "Refused {member} of {who}: {reason}",
        """What the user @UDMABUFD_UID@ asked for exceeds a parameter of the driver, list_limit or size_limit_mb. Root
        can raise it while the service runs, by writing to /sys/module/udmabuf/parameters, or for good on the kernel's
        command line, as in udmabuf.size_limit_mb=256.""",
    )
    ACCESS_DENIED = (
        "5ef4552bb5cc48b0a24dc533009b3117",
        NOTICE,
        "A user was denied what it asked for",
        "Refused {member} of {who}: {reason}",
        """The user @UDMABUFD_UID@ called a member that is for administrators, or presented a file descriptor that
        gives no right to a buffer. Administrators are root and whom polkit allows the action org.udmabufd.admin.""",
    )
    BAD_MEMFD = (
        "e090b09c32f448e2ac8faef898e01566",
        logging.INFO,
        "A memfd of a client cannot be exported",
        "Refused {member} of {who}: {reason}",
        """A memfd that the user @UDMABUFD_UID@ gave to WrapMemfd lacks a seal, a mode, alignment or pages; the message
        says which, and so did the answer to the call. This is for the author of the client to mend.""",
    )
    UDMABUF_REFUSED = (
        "ff70e9200902487294872fac6d81dd4f",
        NOTICE,
        "A buffer was refused: the service cannot make it now",
        "Refused {member} of {who}: {reason}",
        """What the user @UDMABUFD_UID@ asked for needs /dev/udmabuf, which is absent, cannot be opened, or has failed
        its test; then buffers of the kind memfd are served on. Or the service has not taken over the buffers of its
        former run, and waits for an administrator (udmabufctl recover). The message says which.""",
    )
    UNSERVABLE = (
        "0de16b35c8a747d99708bf77ddb2c626",
        logging.INFO,
        "Nothing on this machine can serve a request",
        "Refused {member} of {who}: {reason}",
        """What the user @UDMABUFD_UID@ asked for is not to be had from this kernel and its devices, or for this
        buffer; the message says why. udmabufctl explain, with the same arguments, says it for each allocator, and
        what would help.""",
    )
    # Limits

    MEMORY_TIGHT = (
        "1d4a587f55d84b4384fdb67c44a632f5",
        logging.WARNING,
        "Memory for buffers is nearly used up",
        "{present} of {maximum} bytes of {limit} are in use: buffers are now filled with care",
        """So little is left of @UDMABUFD_LIMIT@ that filling a buffer could make the kernel kill. Until more is free
        each buffer is filled by a process of its own, which is killed in the place of the service; that is slower.

        To give the service more, raise MemoryMax= of udmabufd.slice in a drop-in (systemctl edit udmabufd.slice). To
        give each user less, lower max_bytes_per_user in udmabufd.toml(5). udmabufctl top shows who holds how much,
        udmabufctl list --all every buffer.""",
    )
    FILL_KILLED = (
        "9f3cdb6130fe42b9925d08ad06c59d33",
        logging.WARNING,
        "The process that filled a buffer was killed",
        "Filling {size} bytes for {who} ended without success: {reason}",
        """Memory was nearly used up, and the kernel killed the process that was filling a buffer for the user
        @UDMABUFD_UID@, as it was meant to, and not the service. The caller got the error OutOfMemory; no buffer was
        lost.

        If this repeats, give the service more memory: MemoryMax= of udmabufd.slice.""",
    )
    DESCRIPTORS_SHORT = (
        "be7449117bdc4d9aa4991aa64b53df64",
        logging.WARNING,
        "File descriptors of the service are nearly used up",
        "Only {count} more file descriptors can be opened for buffers: they are refused until some are closed",
        """The service keeps two or three file descriptors for each buffer. LimitNOFILE= of udmabufd.service must fit
        max_buffers in udmabufd.toml(5).""",
    )
    STORE_DELAYED = (
        "bdc49fb2aaea406691ad025b1d29419e",
        logging.WARNING,
        "The service manager is slow to keep file descriptors",
        "The service manager does not take file descriptors: replies wait, the longest for {seconds} s",
        """The file descriptors of each buffer are kept by the service manager, so that a restart of the service loses
        none, and a reply waits until they are. The service manager's notify socket is full: it is busy or stopped.""",
    )
    STORE_FAILED = (
        "172fad365d2c4cbd8ed00678451644f4",
        logging.ERROR,
        "A buffer cannot be kept across a restart",
        "The service manager did not keep the file descriptors of buffer {buffer}: {reason}",
        """The buffer @UDMABUFD_BUFFER@ would have been lost in a restart of the service, so the call that asked for it
        was refused with OutOfMemory.
        FileDescriptorStoreMax= of udmabufd.service must be three for each of max_buffers in udmabufd.toml(5), and
        eight more.""",
    )
    CONFIGURATION_TOO_LARGE = (
        "979890970d6a4eb7a04159023becf71a",
        logging.ERROR,
        "A configured maximum does not fit, and the service does not start",
        "{reason}",
        """The service keeps file descriptors for each buffer, in its own table and in that of the service manager, and
        hands their names on in one environment variable. What max_buffers in udmabufd.toml(5) asks for does not fit
        there; the message says where, with the figures. Lower max_buffers, or raise LimitNOFILE= and
        FileDescriptorStoreMax= of udmabufd.service.""",
        EACH,
    )
    CLIENT_SLOW = (
        "12d62cc43e4d47f58a4e146bf4f6287b",
        NOTICE,
        "A client does not read what it is sent",
        "Connection {client} of {who} does not read: {count} file descriptors for it wait at the bus",
        """The bus allows few file descriptors that are under way. So that one client that does not read its replies
        does not use them up for all, its further replies with file descriptors wait, and are refused with RateLimited
        after a while. Nobody else waits for it.""",
    )
    BUS_SLOW = (
        "b81b688c9a1d4c0f82670c7cc4bb2d52",
        logging.WARNING,
        "The bus takes nothing",
        "The bus has taken nothing for {seconds} s; {count} bytes wait",
        "Replies wait in the service until the message bus reads again. No further calls are served until then.",
    )
    DESCRIPTOR_STUCK = (
        "7c25ec2bfa8f41e782d80191786d64bb",
        logging.WARNING,
        "A file descriptor of a client does not close",
        "{count} of {maximum} foreign file descriptors of {who} hang while they are closed",
        """The user @UDMABUFD_UID@ sent a file descriptor whose file system does not answer, most likely a FUSE file
        system of its own. It is being closed in a thread of its own. At the maximum no further file descriptors of
        this user are taken, and its calls that have some are refused, until the file system answers or ends.""",
    )
    # Recoveries

    STATE_RESTORED = (
        "ecd65a9cea48441a93fa7bf5c5edc35e",
        NOTICE,
        "Buffers were taken over from the former run",
        "Took over {count} buffers with {holders} holders from the former run",
        """The service was restarted, and what it had before is as it was: ids, holders, charges and memory. Clients
        that were connected to the bus all the time notice no more than a delay.""",
        EACH,
    )
    HOLDERS_ENDED = (
        "74fd5a32c6334ece896734f4addf76ef",
        logging.INFO,
        "Clients ended while the service was away",
        "{count} of {holders} holders ended while the service did not run; their shares were released",
        """Whoever disconnected from the bus while the service restarted was found to be gone, and lost its shares as
        it would have otherwise.""",
        EACH,
    )
    BUS_RESTARTED = (
        "942ba31faebf43bf9254182ba4cd32b0",
        logging.WARNING,
        "The message bus was restarted",
        "The bus is another one than that of the former run: {count} buffers wait {seconds} s to be imported again",
        """Unique names on the new bus belong to others, so nobody holds anything any more. Clients that still have a
        file descriptor or a ticket of a buffer import it again; udmabufd's client library does so by itself. What
        nobody has imported by then is released.""",
        EACH,
    )
    GRACE_ENDED = (
        "9c4fb2e218ff4496940e4f02883ecf17",
        NOTICE,
        "Buffers were not imported again in time",
        "{count} buffers that nobody imported after the restart of the bus were released",
        "Their clients have ended, or do not import buffers again when the bus restarts.",
    )
    BUFFER_LOST = (
        "0e01fe9390244a46b4615138660a6445",
        logging.ERROR,
        "A buffer was lost in a restart of the service",
        "Buffer {buffer} of {who} is lost: {reason}",
        """The service had the buffer @UDMABUFD_BUFFER@ in its records, and the service manager did not give its file
        descriptors back. Processes that have the memory open keep it; the service can hand out no more descriptors of
        it, and answers NoSuchBuffer. FileDescriptorStoreMax= of udmabufd.service may have been lowered below what is
        needed for max_buffers in udmabufd.toml(5).""",
        EACH,
    )
    ORPHANS_DROPPED = (
        "60e03dd72e7d4e8c86a351c9b75b0cef",
        NOTICE,
        "File descriptors without a buffer were dropped",
        "{count} file descriptors that belong to no recorded buffer were dropped",
        """The service was killed between two steps of making or releasing a buffer. No caller was told of a buffer
        that is not there: this is the cleaning up.""",
        EACH,
    )
    STATE_UNREADABLE = (
        "1b80c71c412a4bb19a5d338065c3d628",
        logging.ERROR,
        "The state of the former run cannot be read",
        "The state of the former run cannot be read: {reason}; {count} file descriptors are kept (udmabufctl recover)",
        """The record of who holds what is damaged, or was written by a later version. So that no memory is lost by
        mistake, the file descriptors of the buffers stay in the service manager's store, and nothing is allocated.

        Install the version that wrote the state, and restart the service; or, as root, keep what can be kept by
        `udmabufctl recover`, or give the buffers up by `udmabufctl recover --discard`. See udmabufd(8).""",
        EACH,
    )
    STATE_RECOVERED = (
        "cbc53647927045c6adb2edd427af1db6",
        NOTICE,
        "An administrator recovered the buffers of the former run",
        "Recovered on behalf of {who}: {count} buffers were kept",
        """After a start that could not read the state of the former run, the buffers that could be identified were
        kept. Those without an owner are free for whoever imports a file descriptor of them.""",
        EACH,
    )
    STATE_DISCARDED = (
        "0b9bf64163004e0b8ca768e335e78b40",
        logging.WARNING,
        "An administrator gave up the buffers of the former run",
        "Discarded on behalf of {who}: {count} buffers were given up",
        """After a start that could not read the state of the former run, its buffers were given up. The memory is free
        as soon as no process has it open.""",
        EACH,
    )
    BUFFER_REVIVED = (
        "4e1212d689134153ac35701d1f388927",
        logging.INFO,
        "A buffer that nobody held was imported",
        "Buffer {buffer} came back to life: {who} imported it",
        """All shares of the buffer @UDMABUFD_BUFFER@ had been released, and a process that still had its file
        descriptor has become a holder of it.""",
    )
    BUFFER_LINGERS = (
        "5530d6d8390e49d89fbc62578577fe2b",
        logging.INFO,
        "Memory of a released buffer is still in use",
        "Buffer {buffer} of {who} was released and is still in use elsewhere: {size} bytes stay charged",
        """All shares of the buffer @UDMABUFD_BUFFER@ are released, but a process has its file descriptor, a mapping or
        an import. The memory stays charged until the kernel has freed it.""",
    )
    LINGERING_FREED = (
        "a96ee6697bfa4a99b9d31406ee908207",
        logging.INFO,
        "Memory of a released buffer was freed",
        "Buffer {buffer} of {who} is free at last: {size} bytes, {seconds} s after its release",
        "The last process that used the buffer @UDMABUFD_BUFFER@ has let go of it. Its charge has ended.",
    )
    SELF_TEST_FAILED = (
        "3cfc3779219f42ee9b4c77cad7a9aae5",
        logging.ERROR,
        "udmabuf is unavailable",
        "udmabuf is unavailable: {reason}",
        """/dev/udmabuf is absent, cannot be opened, or a buffer made for a test was not as it should be. Served are
        buffers of the kind memfd, and dma-bufs of the other allocators, where there are any (udmabufctl allocators).
        The service tries again at each event that udev has for the device.

        modprobe udmabuf loads the driver, where the kernel has it as a module. The device must be open to the group of
        the service; see udmabufd(8), DEVICES AND GROUPS.""",
        EACH,
    )
    UDMABUF_BACK = (
        "e5355813a3974cbc99e2163431aa81cc",
        NOTICE,
        "udmabuf is available again",
        "udmabuf is available again",
        "/dev/udmabuf has appeared, or has passed its test: dma-bufs are made with it.",
        EACH,
    )
    # Moves

    BUFFER_MOVED = (
        "396708bce17745d2aa55f27c486d3136",
        logging.INFO,
        "A buffer has moved to other memory",
        "Buffer {buffer} of {size} bytes has moved from {former} to {allocator}",
        """A device had been attached that could not use the memory that the buffer @UDMABUFD_BUFFER@ had, or a holder
        or the administrator asked for the move. Its contents are the same; its clients have new descriptors. Memory of
        before is charged until the last descriptor and mapping of it is closed.""",
    )
    MOVE_CANCELLED = (
        "fbc5e36201e74c44bca7f3ea35949cc1",
        NOTICE,
        "A buffer could not be moved or evicted",
        "Buffer {buffer} stays where it is: {reason}",
        """An importer of the buffer @UDMABUFD_BUFFER@ did not answer in time, new memory could not be had, or somebody
        still had a descriptor. Nothing has changed, and whoever had let go of the memory was told to go on with it.
        The limit move_timeout_msec of udmabufd.toml(5) says how long importers have.""",
    )
    BUFFER_EVICTED = (
        "7f1f0c456e2e416c9d2426d3a80d54e4",
        logging.INFO,
        "A buffer was evicted",
        "Buffer {buffer} of {size} bytes is evicted: its memory can be swapped out",
        """Nobody used the buffer @UDMABUFD_BUFFER@, and its holder asked for it, or memory was short. It comes back
        with its contents when it is used again.""",
    )
    DRAINED = (
        "0bfa209b53604deaa9c6b0d63297e0b9",
        NOTICE,
        "An administrator has had the buffers of an allocator moved",
        "{count} buffers were moved away from {allocator}",
        """udmabufctl drain has moved buffers of @UDMABUFD_ALLOCATOR@ to other allocators. Those that were held in
        place have stayed; the command says how many.""",
        EACH,
    )
    # Devices and allocators

    DEVICE_GONE = (
        "c5de78476ac745b0853a5372f0e02add",
        NOTICE,
        "A device is gone, and so are its attachments to buffers",
        "Device {device} is gone: {count} attachments of it to buffers ended",
        """Buffers had been attached to the device @UDMABUFD_DEVICE@ when it was unplugged or its driver was unloaded.
        Its constraints no longer count for them, and the clients that had attached it were told (Detached). The
        buffers themselves, and their memory, stay.""",
        EACH,
    )
    ALLOCATOR_SHORT = (
        "7a3aab2794004269a35e7d0b1e60d6d7",
        NOTICE,
        "An allocator had no memory, and the next was asked",
        "Allocator {allocator} could not serve {who}, so the next that suits was asked: {reason}",
        """The allocator @UDMABUFD_ALLOCATOR@ suits what was asked for and is earlier in the configured order, but its
        pool is empty or its heap used up. If no other one suits, the call is refused, and an entry of its own tells of
        that. What served a buffer is in its info and in udmabufctl info.

        The pool of huge pages is as large as the administrator makes it (sysctl vm.nr_hugepages), that of a contiguous
        heap as the kernel's command line or the device tree says (cma=). udmabufctl allocators shows what is left.""",
    )
    ALLOCATOR_ADDED = (
        "ea22698ff402420887e17ab2f663c488",
        NOTICE,
        "A heap or a card serves buffers",
        "Allocator {allocator} has come and serves buffers",
        """The device of the allocator @UDMABUFD_ALLOCATOR@, a dma-heap or a DRM card that udmabufd.toml(5) names, has
        appeared or can now be opened. udmabufctl allocators shows what its memory is like.""",
        EACH,
    )
    ALLOCATOR_GONE = (
        "827bb81ff54642e2961f838b9fa86b4d",
        NOTICE,
        "A heap or a card serves no buffers any more",
        "Allocator {allocator} serves no buffers any more: {reason}",
        """The device of the allocator @UDMABUFD_ALLOCATOR@, a dma-heap or a DRM card that udmabufd.toml(5) names, is
        gone, or cannot be opened or used; the message says which. Buffers that it has made stay as they are. The
        service tries again at each event that udev has for the device.

        If the service may not open it, the group of the node is not one of its groups; if the unit's device policy
        forbids it, its sandbox does: udmabufd(8), DEVICES AND GROUPS, has the drop-in for both.""",
        EACH,
    )
    CONSTRAINTS_CONTRADICT = (
        "7d1b9112ad45424eaed24499adc404b1",
        logging.WARNING,
        "Entries of the constraint database contradict each other",
        "The constraint database contradicts itself on device {device}: {reason}",
        """Two entries that match the device @UDMABUFD_DEVICE@ cannot both be met; the message names the key and where
        each is from. Until one of them is changed, a buffer cannot be attached to the device: IncompatibleConstraints.

        An entry is overruled by a file of the same name in /etc/udmabufd/devices.d; see udmabufd.devices(5).""",
        EACH,
    )
