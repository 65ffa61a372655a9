"""No connection can be opened any more: by this process, all its threads and its children, for good.

On Linux (x86-64, aarch64) the kernel enforces it, whatever library asks: a seccomp filter, put over all
threads at once. What it refuses, with EACCES:

    socket, socketpair   of any family but AF_UNIX: not even netlink, as nothing here needs it; and local ones
                         for datagrams, which `sendmsg` could send to any daemon's address
    connect              of every socket: one that was opened before could still leave, and behind a local
                         one may sit a daemon that looks up names or fetches (nscd, systemd-resolved, Docker)
    sendto               to an address of its own: a datagram, or TCP Fast Open, which connects
    sendmsg              as TCP Fast Open. Else it stays, as asyncio sends with it; datagram sockets of before
                         the lock, which it could still use, are in `left_open`
    sendmmsg             always
    io_uring_setup       always: a ring opens sockets without a system call of its own
    other call tables    everything: 32-bit programs and x32 know the same calls under other numbers

`accept`, `send` and `recv` stay, so a socket that listens already goes on serving. The process also gains
`no_new_privs`: setuid programs that it starts (sudo, ping) have no more rights than itself. It cannot be
undone, and stops code that phones home; it is no jail for code that means harm, which has files and other
processes to go through. What has to reach a local daemon by `connect` (syslog, a browser that is opened, the
managers of multiprocessing) does so before the lock or not at all.

Elsewhere (macOS, Windows, other processors, kernels without seccomp) an audit hook (PEP 578) of this
interpreter refuses Python's own calls: connecting and sending to other addresses than loopback, and looking
up names. It sees neither native libraries (ONNX Runtime) nor children, nor asyncio's overlapped sockets on
Windows, nor the name that `socket.connect` looks up by itself before it is refused.

Sources: seccomp(2), prctl(2), Linux's Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import os
import platform
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class NetworkLock:
    """What `lock_network` could do here."""

    kind: Literal["kernel", "python", "none"]
    reason: str | None  # why the kernel does not enforce it; None if it does
    left_open: tuple[str, ...] = ()
    """Connections and datagram sockets of before the lock, which it leaves alone: they still carry data. Only
    Linux tells."""


_once = threading.Lock()
_lock: NetworkLock | None = None


def lock_network(*, fatal: bool = False) -> NetworkLock:
    """Locks the network for good; a second call changes nothing and returns the first one's answer.

    What is refused raises PermissionError (an OSError, errno EACCES); looking up a name may raise
    socket.gaierror instead. `fatal` ends the process at its first attempt to make a socket (SIGSYS), which
    proves that there was none in one that lives; only the kernel can do that.

    Never raises: the answer's kind says how far the lock goes.
    """
    global _lock
    with _once:
        if _lock is None:
            _lock = _lock_network(fatal)
        return _lock


def _lock_network(fatal: bool) -> NetworkLock:
    left_open = tuple(_open_sockets())
    failure = _lock_in_kernel(fatal)
    if failure is None:
        return NetworkLock("kernel", None, left_open)
    if _lock_in_python():
        return NetworkLock("python", failure, left_open)
    return NetworkLock("none", f"{failure}, and an audit hook of this process keeps others out", left_open)


# The kernel's filter


@dataclass(frozen=True)
class Calls:
    """Numbers of system calls on one architecture, and the architecture's own (linux/audit.h)."""

    architecture: int
    seccomp: int
    socket: int
    socketpair: int
    connect: int
    sendto: int
    sendmsg: int
    sendmmsg: int
    io_uring_setup: int = 425


CALLS = {
    "x86_64": Calls(0xC000003E, 317, 41, 53, 42, 44, 46, 307),
    "aarch64": Calls(0xC00000B7, 277, 198, 199, 203, 206, 211, 269),
}

Instruction = tuple[int, int, int, int]
"""code, jump if true, jump if false (both count the instructions to skip), constant: a sock_filter."""

REFUSE = 0x50000 | errno.EACCES  # SECCOMP_RET_ERRNO
END = 0x80000000  # SECCOMP_RET_KILL_PROCESS
ALLOW = 0x7FFF0000

_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
_TSYNC = 1
_FIRST_X32_CALL = 0x40000000
_MSG_FASTOPEN = 0x20000000
_DATAGRAMS = (
    2  # a bit of SOCK_DGRAM and of SOCK_RAW, which is the same there; not of SOCK_STREAM, SOCK_SEQPACKET
)

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16  # in seccomp_data


def network_filter(calls: Calls, *, fatal: bool = False) -> list[Instruction]:
    """The filter's program (classic BPF) over seccomp_data."""
    refuse, allow = _do(REFUSE), _do(ALLOW)
    no_socket = _do(END) if fatal else refuse
    of_this_machine = [
        *(_load(_argument(0)), (_EQUAL, 0, 4, int(socket.AF_UNIX))),
        *(_load(_argument(1)), (_ANY_BIT, 1, 0, _DATAGRAMS)),
        *(allow, refuse, no_socket),
    ]
    return [
        _load(_ARCHITECTURE_AT),
        (_EQUAL, 1, 0, calls.architecture),
        no_socket,
        _load(_NUMBER_AT),
        (_AT_LEAST, 0, 1, _FIRST_X32_CALL),
        no_socket,
        *_if_called(calls.socket, of_this_machine),
        *_if_called(calls.socketpair, of_this_machine),
        *_if_called(calls.connect, [refuse]),
        # An address, a pointer of two words: `send` is this call without one.
        *_if_called(
            calls.sendto,
            [
                *(_load(_argument(4)), (_EQUAL, 0, 3, 0)),
                *(_load(_argument(4) + 4), (_EQUAL, 0, 1, 0)),
                *(allow, refuse),
            ],
        ),
        *_if_called(calls.sendmsg, [_load(_argument(2)), (_ANY_BIT, 0, 1, _MSG_FASTOPEN), refuse, allow]),
        *_if_called(calls.sendmmsg, [refuse]),
        *_if_called(calls.io_uring_setup, [no_socket]),
        allow,
    ]


def _load(offset: int) -> Instruction:
    return (_LOAD, 0, 0, offset)


def _do(action: int) -> Instruction:
    return (_RETURN, 0, 0, action)


def _argument(index: int) -> int:
    """Where its lower word is: both architectures are little-endian."""
    return _ARGUMENTS_AT + 8 * index


def _if_called(number: int, block: list[Instruction]) -> list[Instruction]:
    """`block` must return in all cases: the loaded number is gone after it."""
    return [(_EQUAL, 0, len(block), number), *block]


class _SockFilter(ctypes.Structure):
    _fields_: ClassVar = [
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    ]


class _SockProgram(ctypes.Structure):
    _fields_: ClassVar = [("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_SockFilter))]


def _lock_in_kernel(fatal: bool) -> str | None:
    """None if the lock holds, or why it does not."""
    if sys.platform != "linux":
        return f"only Linux's kernel can do it, and this is {platform.system() or sys.platform}"
    calls = CALLS.get(platform.machine())
    if calls is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        return f"the filter for {platform.machine()} processors is not written"
    if failure := _install(calls, network_filter(calls, fatal=fatal)):
        return failure
    # Emulators accept a filter and run on without it.
    return None if fatal or _is_refused() else "the kernel took the filter, but does not apply it"


def _install(calls: Calls, program: list[Instruction]) -> str | None:
    """Puts the filter over all threads of this process; None, or why it could not."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    word = ctypes.c_ulong
    if libc.prctl(ctypes.c_int(_PR_SET_NO_NEW_PRIVS), word(1), word(0), word(0), word(0)):
        return f"prctl(PR_SET_NO_NEW_PRIVS) failed: {os.strerror(ctypes.get_errno())}"
    instructions = (_SockFilter * len(program))(*(_SockFilter(*each) for each in program))
    argument = _SockProgram(len(program), instructions)
    number, mode, flags = ctypes.c_long(calls.seccomp), word(_SET_MODE_FILTER), word(_TSYNC)
    result = libc.syscall(number, mode, flags, ctypes.byref(argument))
    if result > 0:
        return f"thread {result} has a seccomp filter of its own"
    if result:
        return f"the kernel refuses seccomp filters: {os.strerror(ctypes.get_errno())}"
    return None


def _is_refused() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _open_sockets() -> Iterator[str]:
    """What could still leave: inet sockets of this process that do not listen, and io_uring's rings."""
    with contextlib.suppress(OSError):  # no /proc
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                target = os.readlink(path)  # noqa: PTH115  (a Path would not keep "socket:[7]" as it is)
                if target == "anon_inode:[io_uring]":
                    yield "a ring of io_uring"
                elif target.startswith("socket:") and (told := _describe(int(path.name))):
                    yield told


def _describe(descriptor: int) -> str | None:
    """`TCP 10.0.0.7:40112 to 93.184.215.14:443`; None for one that listens or stays on this machine."""
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        if copy.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        kind = {socket.SOCK_STREAM: "TCP", socket.SOCK_DGRAM: "UDP"}.get(copy.type, copy.type.name)
        text = f"{kind} {_address(copy.getsockname())}"
        with contextlib.suppress(OSError):  # not connected
            text += f" to {_address(copy.getpeername())}"
        return text


def _address(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# Python's hook

_NAMES = {"localhost", "", None}
_HOOK_TEST = "pocketlm.network_lock"


def _lock_in_python() -> bool:
    """Whether the interpreter took the hook: one that is there already can refuse others silently."""
    heard = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal heard
        if event == _HOOK_TEST:
            heard = True
        elif event.startswith("socket."):
            refuse_event(event, arguments)

    sys.addaudithook(hook)
    sys.audit(_HOOK_TEST)
    return heard


def refuse_event(event: str, arguments: tuple[Any, ...]) -> None:
    """Raises PermissionError (EACCES) for an audit event of Python's that leaves this machine."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        connection, address = arguments[:2]
        allowed = address is None or _stays_here(connection.family, address)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        allowed = _needs_no_lookup(arguments[0])
    elif event in ("socket.gethostbyaddr", "socket.getnameinfo"):
        host = arguments[0] if isinstance(arguments[0], str) else arguments[0][0]
        allowed = _is_loopback(host)
    else:
        return
    if not allowed:
        raise PermissionError(errno.EACCES, f"pocketlm has locked the network ({event})")


def _stays_here(family: int, address: Any) -> bool:
    if family == getattr(socket, "AF_UNIX", None):
        return True
    return family in (socket.AF_INET, socket.AF_INET6) and _is_loopback(address[0])


def _is_loopback(host: object) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(_text(host) or "").is_loopback
    except ValueError:
        return False


def _needs_no_lookup(host: object) -> bool:
    """An address is its own answer."""
    text = _text(host)
    if text in _NAMES:
        return True
    try:
        ipaddress.ip_address(text or "")
    except ValueError:
        return False
    return True


def _text(host: object) -> str | None:
    """Python's functions take names as text and as bytes."""
    if isinstance(host, bytes | bytearray):
        return host.decode(errors="replace")
    return None if host is None else str(host)
