"""The network's lock: in processes of their own, and where the kernel has none."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pocketlm import network_lock
from pocketlm.network_lock import (
    CALLS,
    NetworkLock,
    lock_network,
)

ROOT = Path(__file__).parents[2]
FAST_OPEN = 0x20000000

kernel_only = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in CALLS, reason="no filter for this system"
)
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="calls of x86-64")

PREAMBLE = """
import asyncio, ctypes, errno, json, os, socket, subprocess, sys, threading
from pocketlm.network_lock import lock_network

def tried(call):
    try:
        call()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return "done"
"""


def process(script: str, *, returncode: int = 0) -> Any:
    """Runs `script` behind PREAMBLE in a new interpreter; the last line that it prints is JSON."""
    result = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("models", "runtime"))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == returncode, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@kernel_only
class TestKernel:
    def test_no_new_socket_but_local_ones(self) -> None:
        found = process(
            """
lock = lock_network()
families = (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET)
def call_child():
    code = "import socket\\ntry: socket.socket()\\nexcept PermissionError: raise SystemExit(7)"
    return subprocess.run([sys.executable, "-c", code]).returncode
print(json.dumps({
    "kind": lock.kind, "reason": lock.reason, "again": lock_network(fatal=True) is lock,
    "families": [tried(lambda: socket.socket(family, socket.SOCK_RAW)) for family in families],
    "connection": tried(lambda: socket.create_connection(("127.0.0.1", 9))),
    "pair": tried(socket.socketpair), "local": tried(lambda: socket.socket(socket.AF_UNIX)),
    "local datagrams": tried(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)),
    "daemon": tried(lambda: socket.socket(socket.AF_UNIX).connect("/run/systemd/resolve/io.systemd.Resolve")),
    "child": call_child(),
}))
"""
        )
        assert found == {
            "kind": "kernel",
            "reason": None,
            "again": True,
            "families": ["EACCES"] * 4,
            "connection": "EACCES",
            "pair": "done",
            "local": "done",
            "local datagrams": "EACCES",
            "daemon": "EACCES",
            "child": 7,
        }

    def test_threads_of_before_and_after(self) -> None:
        found = process(
            """
found, locked = {}, threading.Event()
def earlier():
    locked.wait()
    found["earlier"] = tried(socket.socket)
thread = threading.Thread(target=earlier)
thread.start()
lock_network()
locked.set()
thread.join()
later = threading.Thread(target=lambda: found.update(later=tried(socket.socket)))
later.start()
later.join()
print(json.dumps(found))
"""
        )
        assert found == {"earlier": "EACCES", "later": "EACCES"}

    def test_sockets_of_before_the_lock_cannot_leave(self) -> None:
        found = process(
            f"""
listener = socket.create_server(("127.0.0.1", 0))
datagrams, stream = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket()
address = listener.getsockname()
lock = lock_network()
print(json.dumps({{
    "connect": [tried(lambda: each.connect(address)) for each in (stream, datagrams)],
    "sendto": tried(lambda: datagrams.sendto(b"x", address)),
    "fast open": [
        tried(lambda: stream.sendto(b"x", {FAST_OPEN}, address)),
        tried(lambda: stream.sendmsg([b"x"], [], {FAST_OPEN}, address)),
    ],
    "left open": sorted(lock.left_open),
}}))
"""
        )
        assert found == {
            "connect": ["EACCES"] * 2,
            "sendto": "EACCES",
            "fast open": ["EACCES"] * 2,
            "left open": ["TCP 0.0.0.0:0", "UDP 0.0.0.0:0"],
        }

    def test_a_connection_of_before_is_told(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            found = process(
                f"""
connection = socket.create_connection(("127.0.0.1", {port}))
left = lock_network().left_open
connection.sendall(b"still open")
print(json.dumps([left, connection.getsockname()[1]]))
"""
            )
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.recv(100) == b"still open"
        assert found == [[f"TCP 127.0.0.1:{found[1]} to 127.0.0.1:{port}"], found[1]]

    def test_a_server_goes_on_serving(self) -> None:
        script = """
async def answer(reader, writer):
    line = await reader.readline()
    pieces = [b"heard ", await asyncio.to_thread(line.upper)]
    writer.writelines(pieces)  # by sendmsg, from Python 3.12 on
    await writer.drain()
    writer.close()
    done.set()

async def serve():
    global done
    done = asyncio.Event()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    lock = lock_network()
    print(json.dumps([server.sockets[0].getsockname()[1], lock.kind, lock.left_open]), flush=True)
    await asyncio.wait_for(done.wait(), 30)

asyncio.run(serve())
"""
        paths = os.pathsep.join(str(ROOT / name) for name in ("models", "runtime"))
        with subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + script],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stdout is not None
            port, kind, left_open = json.loads(server.stdout.readline())
            with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
                client.sendall(b"hello\n")
                with client.makefile("rb") as answer:
                    assert answer.read() == b"heard HELLO\n"
        assert (server.returncode, kind, left_open) == (0, "kernel", [])

    def test_fatal_ends_the_process_at_the_first_socket(self) -> None:
        script = "print(json.dumps(lock_network(fatal=True).kind), flush=True)\ntried(socket.socketpair)\n"
        assert process(script) == "kernel"
        assert process(script + "tried(socket.socket)", returncode=-signal.SIGSYS) == "kernel"

    @x86_only
    def test_calls_by_another_table(self) -> None:
        """x32's numbers, and 32-bit x86's through its interrupt, where the kernel has them."""
        found = process(
            """
import mmap
libc = ctypes.CDLL(None, use_errno=True)
def x32():
    return ctypes.get_errno() if libc.syscall(0x40000000 + 41, 2, 1, 0) < 0 else 0
def interrupt():  # push rbx; mov eax, 359 (socket); ebx, 2; ecx, 1; edx, 0; int 0x80; pop rbx; ret
    code = bytes.fromhex("53 b867010000 bb02000000 b901000000 ba00000000 cd80 5b c3")
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
child = os.fork()
if not child:
    os._exit(0 if interrupt() > 0 else 1)
has_interrupt = os.waitpid(child, 0)[1] == 0
lock_network()
print(json.dumps([errno.errorcode[x32()], interrupt() if has_interrupt else -errno.EACCES]))
"""
        )
        assert found == ["EACCES", -errno.EACCES]


class TestWithoutTheKernel:
    @pytest.fixture(autouse=True)
    def unlocked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(network_lock, "_lock", None)
        monkeypatch.setattr(network_lock, "_open_sockets", lambda: ["UDP 0.0.0.0:0"])

    @pytest.fixture
    def hooks(self, monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., None]]:
        """What was given to the interpreter, which would keep it for the other tests."""
        hooks: list[Callable[..., None]] = []
        monkeypatch.setattr(sys, "addaudithook", hooks.append)
        monkeypatch.setattr(sys, "audit", lambda event: [hook(event, ()) for hook in hooks])
        return hooks

    @pytest.mark.parametrize(
        ("system", "machine", "reason"),
        [
            ("darwin", "arm64", "only Linux's kernel can do it"),
            ("linux", "riscv64", "the filter for riscv64 processors is not written"),
        ],
    )
    def test_a_hook_takes_its_place(
        self,
        system: str,
        machine: str,
        reason: str,
        monkeypatch: pytest.MonkeyPatch,
        hooks: list[Callable[..., None]],
    ) -> None:
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        found = lock_network()
        assert (found.kind, found.left_open) == ("python", ("UDP 0.0.0.0:0",))
        assert found.reason is not None
        assert found.reason.startswith(reason)
        (hook,) = hooks
        hook("open", ("/etc/hosts",))
        with pytest.raises(PermissionError, match="pocketlm has locked the network"):
            hook("socket.getaddrinfo", ("example.com", 80, 0, 0, 0))

    @pytest.mark.parametrize(
        ("prctl", "result", "reason"),
        [
            (-1, 0, "prctl(PR_SET_NO_NEW_PRIVS) failed"),
            (0, 77, "thread 77 has a seccomp filter of its own"),
            (0, -1, "the kernel refuses seccomp filters"),
            (0, 0, "the kernel took the filter, but does not apply it"),
        ],
    )
    def test_a_kernel_that_does_not(
        self,
        prctl: int,
        result: int,
        reason: str,
        monkeypatch: pytest.MonkeyPatch,
        hooks: list[Callable[..., None]],
    ) -> None:
        class Syscall:
            restype: object = None

            def __call__(self, *arguments: object) -> int:
                return result

        libc = SimpleNamespace(prctl=lambda *arguments: prctl, syscall=Syscall())
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(network_lock.ctypes, "CDLL", lambda name, use_errno: libc)
        with pytest.MonkeyPatch.context() as patch:
            if prctl == result == 0:  # the one that looks whether it holds
                patch.setattr(socket, "socket", lambda *arguments: SimpleNamespace(close=lambda: None))
            found = lock_network()
        assert found.kind == "python"
        assert found.reason is not None
        assert found.reason.startswith(reason)

    def test_a_hook_that_keeps_others_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(sys, "addaudithook", lambda hook: None)
        found = lock_network()
        assert found.kind == "none"
        assert found.reason is not None
        assert "an audit hook of this process keeps others out" in found.reason
        assert lock_network() is found


def test_the_hook_in_a_process() -> None:
    """Python's events as they come, not as this test thinks they do."""
    found = process(
        """
import platform
platform.machine = lambda: "riscv64"
sys.platform = "darwin" if sys.platform == "linux" else sys.platform
lock = lock_network()
udp = lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listener = socket.create_server(("127.0.0.1", 0))
print(json.dumps({
    "kind": lock.kind,
    "connect": tried(lambda: udp().connect(("192.0.2.1", 9))),
    "connect_ex": tried(lambda: udp().connect_ex(("192.0.2.1", 9))),
    "sendto": tried(lambda: udp().sendto(b"x", ("192.0.2.1", 9))),
    "getaddrinfo": tried(lambda: socket.getaddrinfo("pocketlm.invalid", 80)),
    "gethostbyname": tried(lambda: socket.gethostbyname("pocketlm.invalid")),
    "getnameinfo": tried(lambda: socket.getnameinfo(("192.0.2.1", 80), 0)),
    "loopback": tried(lambda: socket.create_connection(listener.getsockname())),
    "pair": tried(socket.socketpair),
}))
"""
    )
    refused = {"connect", "connect_ex", "sendto", "getaddrinfo", "gethostbyname", "getnameinfo"}
    assert found == {
        "kind": "python",
        **dict.fromkeys(refused, "EACCES"),
        "loopback": "done",
        "pair": "done",
    }


def test_two_threads_lock_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[NetworkLock] = []
    monkeypatch.setattr(network_lock, "_lock", None)
    monkeypatch.setattr(network_lock, "_lock_network", lambda fatal: NetworkLock("kernel", None))
    threads = [threading.Thread(target=lambda: found.append(lock_network())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({id(each) for each in found}) == 1
