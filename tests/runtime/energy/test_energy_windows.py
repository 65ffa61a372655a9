"""Device interfaces, with the DLLs' functions played by Python: pointers arrive as ctypes' references."""

from __future__ import annotations

import ctypes
import sys
import uuid
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pocketlm.energy.windows import WindowsDevices

GUID = "45bd8344-7ed6-49cf-a440-c276c933b053"
INVALID = ctypes.c_void_p(-1).value
PATHS = ["\\\\?\\ACPI#GenuineIntel#{45bd8344}", "\\\\?\\ROOT#Zähler#{45bd8344}"]


class FakeWindows:
    """As much of setupapi.dll and kernel32.dll as is called; notes what is given back."""

    def __init__(self, paths: list[str]) -> None:
        self.device_paths = paths
        self.answers = {0x224000: b"\2\0"}
        self.released: list[int] = []
        self.error = 0
        self.setupapi = SimpleNamespace(
            SetupDiGetClassDevsW=self._function(self.get_class),
            SetupDiEnumDeviceInterfaces=self._function(self.enumerate),
            SetupDiGetDeviceInterfaceDetailW=self._function(self.detail),
            SetupDiDestroyDeviceInfoList=self._function(self.release),
        )
        self.kernel32 = SimpleNamespace(
            CreateFileW=self._function(self.create_file),
            DeviceIoControl=self._function(self.device_control),
            CloseHandle=self._function(self.release),
        )

    def _function(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any) -> Any:  # a bound method takes no restype
            return method(*args)

        return function

    def devices(self) -> WindowsDevices:
        return WindowsDevices(self.setupapi, self.kernel32, lambda: self.error)

    def fail(self, error: int, value: int | None = 0) -> int | None:
        self.error = error
        return value

    def get_class(self, guid: Any, enumerator: None, window: None, flags: int) -> int | None:
        assert bytes(guid._obj) == uuid.UUID(GUID).bytes_le
        assert flags == 0x12
        return 2**40 if self.device_paths is not None else None

    def enumerate(self, devices: int, info: None, guid: Any, index: int, data: Any) -> int | None:
        assert data._obj.size == (32 if ctypes.sizeof(ctypes.c_void_p) == 8 else 28)
        if index >= len(self.device_paths):
            return self.fail(259)  # ERROR_NO_MORE_ITEMS
        data._obj.reserved = index
        return 1

    def detail(
        self, devices: int, data: Any, buffer: Any, size: int | ctypes.c_uint32, required: Any, info: None
    ) -> int | None:
        record = (self.device_paths[data._obj.reserved] + "\0").encode("utf-16-le")
        if buffer is None:
            required._obj.value = 4 + len(record)
            return self.fail(122)  # ERROR_INSUFFICIENT_BUFFER
        assert ctypes.c_uint32.from_buffer(buffer._obj).value in (6, 8)
        assert isinstance(size, ctypes.c_uint32)
        assert size.value == 4 + len(record)
        ctypes.memmove(ctypes.addressof(buffer._obj) + 4, record, len(record))
        return 1

    def create_file(self, path: str, access: int, share: int, *rest: Any) -> int | None:
        assert (access, share) == (0x80000000, 3)
        return 2**40 + 1 if path in self.device_paths else self.fail(5, INVALID)

    def device_control(
        self,
        handle: int,
        code: int,
        source: None,
        source_size: int,
        buffer: Any,
        size: int,
        returned: Any,
        _: None,
    ) -> int | None:
        assert handle == 2**40 + 1
        if code not in self.answers:
            return self.fail(1)
        answer = self.answers[code]
        ctypes.memmove(buffer._obj, answer, len(answer))
        returned._obj.value = len(answer)
        return 1

    def release(self, handle: int) -> int:
        self.released.append(handle)
        return 1


@pytest.mark.parametrize("paths", [[], PATHS[:1], PATHS])
def test_paths(paths: list[str]) -> None:
    windows = FakeWindows(paths)
    assert windows.devices().paths(GUID) == paths
    assert windows.released == [2**40]


def test_a_list_that_cannot_be_had() -> None:
    windows = FakeWindows([])
    windows.setupapi.SetupDiGetClassDevsW = lambda *args: windows.fail(8, INVALID)
    with pytest.raises(OSError, match="SetupDiGetClassDevsW fails with Windows error 8"):
        windows.devices().paths(GUID)
    assert not windows.released


def test_a_path_that_cannot_be_had_gives_the_list_back() -> None:
    windows = FakeWindows(PATHS)
    windows.setupapi.SetupDiGetDeviceInterfaceDetailW = lambda *args: windows.fail(13)
    with pytest.raises(OSError, match="SetupDiGetDeviceInterfaceDetailW fails with Windows error 13"):
        windows.devices().paths(GUID)
    assert windows.released == [2**40]


def test_control_returns_what_the_driver_wrote() -> None:
    windows = FakeWindows(PATHS)
    device = windows.devices().open(PATHS[1])
    assert device.control(0x224000, 64) == b"\2\0"
    with pytest.raises(OSError, match="DeviceIoControl 0x224004 fails with Windows error 1"):
        device.control(0x224004, 4)


def test_a_handle_is_closed_once() -> None:
    windows = FakeWindows(PATHS)
    device = windows.devices().open(PATHS[0])
    device.close()
    device.close()
    assert windows.released == [2**40 + 1]
    with pytest.raises(OSError, match="the device is closed"):
        device.control(0x224000, 2)


def test_a_device_that_may_not_be_opened() -> None:
    with pytest.raises(OSError, match="CreateFileW fails with Windows error 5"):
        FakeWindows(PATHS).devices().open("elsewhere")


def test_handles_are_as_wide_as_pointers() -> None:
    windows = FakeWindows(PATHS)
    windows.devices()
    assert windows.setupapi.SetupDiGetClassDevsW.restype is ctypes.c_void_p
    assert windows.kernel32.CreateFileW.restype is ctypes.c_void_p
    assert windows.kernel32.DeviceIoControl.argtypes[0] is ctypes.c_void_p


@pytest.mark.skipif(sys.platform == "win32", reason="for the other systems")
def test_not_windows() -> None:
    assert WindowsDevices.load() is None


@pytest.mark.skipif(sys.platform != "win32", reason="calls Windows")
def test_windows_own_list() -> None:
    devices = WindowsDevices.load()
    assert devices is not None
    assert all(path.startswith("\\\\") for path in devices.paths(GUID))
