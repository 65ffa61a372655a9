"""What the lock refuses: the kernel's program on a small machine for it, and the events of Python's hook."""

from __future__ import annotations

import errno
import socket
import struct
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.network_lock import (
    ALLOW,
    CALLS,
    END,
    REFUSE,
    Calls,
    network_filter,
    refuse_event,
)

FAST_OPEN = 0x20000000


class Machine:
    """Runs a filter as the kernel does (Documentation/networking/filter.rst), as far as ours goes."""

    def __init__(self, program: list[tuple[int, int, int, int]]) -> None:
        self.program = program

    def run(self, architecture: int, number: int, *arguments: int) -> int:
        words = [argument & (1 << 64) - 1 for argument in (*arguments, *[0] * (6 - len(arguments)))]
        data = struct.pack("<IIQ6Q", number, architecture, 0, *words)
        at = accumulator = 0
        while True:
            code, if_true, if_false, k = self.program[at]
            at += 1
            if code == 0x20:
                (accumulator,) = struct.unpack_from("<I", data, k)
            elif code == 0x06:
                return k
            else:
                held = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
                at += if_true if held else if_false


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS.keys())
class TestProgram:
    @given(family=st.integers(0, 2**31 - 1), above=st.integers(0, 2**32 - 1))
    def test_sockets_of_a_family(self, calls: Calls, family: int, above: int) -> None:
        """The kernel reads the lower word alone."""
        ordinary, fatal = (Machine(network_filter(calls, fatal=fatal)) for fatal in (False, True))
        argument = above << 32 | family
        for number in (calls.socket, calls.socketpair):
            refused = family != socket.AF_UNIX
            assert ordinary.run(calls.architecture, number, argument) == (REFUSE if refused else ALLOW)
            assert fatal.run(calls.architecture, number, argument) == (END if refused else ALLOW)

    @pytest.mark.parametrize(
        "kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM, socket.SOCK_RAW]
    )
    @pytest.mark.parametrize("fatal", [False, True])
    def test_local_sockets_have_no_address_to_send_to(self, calls: Calls, kind: int, *, fatal: bool) -> None:
        machine = Machine(network_filter(calls, fatal=fatal))
        expected = REFUSE if kind in (socket.SOCK_DGRAM, socket.SOCK_RAW) else ALLOW
        for number in (calls.socket, calls.socketpair):
            for flags in (0, 0o4000 | 0o2000000):  # SOCK_NONBLOCK, SOCK_CLOEXEC
                assert machine.run(calls.architecture, number, socket.AF_UNIX, kind | flags) == expected

    @given(address=st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 1 << 32]))
    def test_sending_to_an_address(self, calls: Calls, address: int) -> None:
        found = Machine(network_filter(calls)).run(calls.architecture, calls.sendto, 3, 4096, 1, 0, address)
        assert found == (REFUSE if address else ALLOW)

    @given(flags=st.integers(0, 2**31 - 1))
    def test_fast_open(self, calls: Calls, flags: int) -> None:
        found = Machine(network_filter(calls)).run(calls.architecture, calls.sendmsg, 3, 4096, flags)
        assert found == (REFUSE if flags & FAST_OPEN else ALLOW)

    @given(number=st.integers(0, 2**32 - 1))
    def test_the_other_calls(self, calls: Calls, number: int) -> None:
        always = {calls.connect, calls.sendmmsg, calls.io_uring_setup}
        looked_at = {calls.socket, calls.socketpair, calls.sendto, calls.sendmsg}
        found = Machine(network_filter(calls)).run(calls.architecture, number, socket.AF_UNIX)
        if number not in looked_at:
            assert found == (REFUSE if number in always or number >= 0x40000000 else ALLOW)

    def test_calls_that_are_always_refused(self, calls: Calls) -> None:
        machine = Machine(network_filter(calls))
        for number in (calls.connect, calls.sendmmsg, calls.io_uring_setup):
            assert machine.run(calls.architecture, number) == REFUSE

    @given(architecture=st.integers(0, 2**32 - 1), number=st.integers(0, 500))
    def test_another_architecture(self, calls: Calls, architecture: int, number: int) -> None:
        if architecture != calls.architecture:
            assert Machine(network_filter(calls)).run(architecture, number) == REFUSE


IPV4 = SimpleNamespace(family=socket.AF_INET)
IPV6 = SimpleNamespace(family=socket.AF_INET6)
BLUETOOTH = SimpleNamespace(family=31)


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        ("socket.connect", (IPV4, ("93.184.215.14", 443))),
        ("socket.connect", (IPV4, ("example.com", 443))),
        ("socket.connect", (IPV4, ("", 443))),
        ("socket.connect", (IPV6, ("2606:4700::1111", 443, 0, 0))),
        ("socket.connect", (BLUETOOTH, ("127.0.0.1", 1))),
        ("socket.sendto", (IPV4, ("192.0.2.1", 53))),
        ("socket.sendmsg", (IPV4, ("192.0.2.1", 53))),
        ("socket.getaddrinfo", ("example.com", 443, 0, 0, 0)),
        ("socket.getaddrinfo", (b"example.com", 443, 0, 0, 0)),
        ("socket.gethostbyname", ("example.com",)),
        ("socket.gethostbyaddr", ("192.0.2.1",)),
        ("socket.getnameinfo", (("192.0.2.1", 80),)),
    ],
)
def test_what_python_refuses(event: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(PermissionError) as caught:
        refuse_event(event, arguments)
    assert caught.value.errno == errno.EACCES
    assert event in str(caught.value)


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        ("socket.connect", (IPV4, ("127.0.0.1", 8642))),
        ("socket.connect", (IPV6, ("::1", 8642, 0, 0))),
        ("socket.connect", (IPV4, ("localhost", 8642))),
        ("socket.sendmsg", (IPV4, None)),
        ("socket.getaddrinfo", (None, 8642, 0, 0, 0)),
        ("socket.getaddrinfo", (b"localhost", 8642, 0, 0, 0)),
        ("socket.getaddrinfo", ("0.0.0.0", 8642, 0, 0, 0)),
        ("socket.gethostbyname", ("127.0.0.1",)),
        ("socket.getnameinfo", (("127.0.0.1", 80),)),
        ("socket.gethostbyaddr", ("::1",)),
        ("socket.bind", (IPV4, ("0.0.0.0", 8642))),
    ],
)
def test_what_python_lets_pass(event: str, arguments: tuple[Any, ...]) -> None:
    refuse_event(event, arguments)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no local sockets")
def test_local_sockets_pass() -> None:
    refuse_event("socket.connect", (SimpleNamespace(family=socket.AF_UNIX), "/run/socket"))
