"""Windows' device interfaces through ctypes: list them, open one, send it control codes.

The calls are SetupAPI's (SetupDiGetClassDevsW and its kin) and kernel32's (CreateFileW, DeviceIoControl).
Everything Windows-only is reached through objects that are handed in, so that this file loads, and its tests
run, on any platform; sizes are spelled out (c_uint32) as ctypes.wintypes has other ones elsewhere.
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

_DIGCF_PRESENT_INTERFACES = 0x02 | 0x10  # DIGCF_PRESENT | DIGCF_DEVICEINTERFACE
_GENERIC_READ = 0x80000000
_SHARE_READ_WRITE = 0x1 | 0x2
_OPEN_EXISTING = 3
_INVALID_HANDLE = ctypes.c_void_p(-1).value

# sizeof(SP_DEVICE_INTERFACE_DETAIL_DATA_W), a DWORD and a WCHAR: setupapi.h packs it on 32 bits only.
_DETAIL_SIZE = 8 if ctypes.sizeof(ctypes.c_void_p) == 8 else 6


class Device(Protocol):
    """An open device."""

    def control(self, code: int, size: int) -> bytes:
        """The answer to a control code, at most `size` bytes; raises OSError."""
        ...

    def close(self) -> None: ...


class Devices(Protocol):
    """The devices of this machine."""

    def paths(self, interface: str) -> list[str]:
        """The paths of all devices that are present and offer `interface`, a GUID; raises OSError."""
        ...

    def open(self, path: str) -> Device:
        """Opens a device for reading; raises OSError."""
        ...


class _InterfaceData(ctypes.Structure):
    """SP_DEVICE_INTERFACE_DATA."""

    _fields_: ClassVar = [
        ("size", ctypes.c_uint32),
        ("interface", ctypes.c_ubyte * 16),
        ("flags", ctypes.c_uint32),
        ("reserved", ctypes.c_size_t),
    ]


class WindowsDevices:
    """Devices through setupapi.dll and kernel32.dll, opened with `use_last_error`."""

    def __init__(self, setupapi: Any, kernel32: Any, last_error: Callable[[], int]) -> None:
        # Without these, ctypes would cut handles to 32 bits.
        pointer, dword = ctypes.c_void_p, ctypes.c_uint32
        setupapi.SetupDiGetClassDevsW.restype = pointer
        setupapi.SetupDiGetClassDevsW.argtypes = [pointer, ctypes.c_wchar_p, pointer, dword]
        setupapi.SetupDiEnumDeviceInterfaces.argtypes = [pointer, pointer, pointer, dword, pointer]
        setupapi.SetupDiGetDeviceInterfaceDetailW.argtypes = [
            pointer,
            pointer,
            pointer,
            dword,
            pointer,
            pointer,
        ]
        setupapi.SetupDiDestroyDeviceInfoList.argtypes = [pointer]
        kernel32.CreateFileW.restype = pointer
        kernel32.CreateFileW.argtypes = [ctypes.c_wchar_p, dword, dword, pointer, dword, dword, pointer]
        kernel32.DeviceIoControl.argtypes = [pointer, dword, pointer, dword, pointer, dword, pointer, pointer]
        kernel32.CloseHandle.argtypes = [pointer]
        self._setupapi = setupapi
        self._kernel32 = kernel32
        self._last_error = last_error

    @classmethod
    def load(cls) -> WindowsDevices | None:
        """This Windows' devices; None on another system."""
        library = getattr(ctypes, "WinDLL", None)
        last_error = getattr(ctypes, "get_last_error", None)
        if library is None or last_error is None:
            return None
        return cls(
            library("setupapi", use_last_error=True), library("kernel32", use_last_error=True), last_error
        )

    def paths(self, interface: str) -> list[str]:
        """The paths of all devices that are present and offer `interface`, a GUID; raises OSError."""
        guid = (ctypes.c_ubyte * 16)(*uuid.UUID(interface).bytes_le)
        devices = self._setupapi.SetupDiGetClassDevsW(
            ctypes.byref(guid), None, None, _DIGCF_PRESENT_INTERFACES
        )
        if devices == _INVALID_HANDLE:
            raise self._error("SetupDiGetClassDevsW")
        try:
            paths: list[str] = []
            data = _InterfaceData(size=ctypes.sizeof(_InterfaceData))
            while self._setupapi.SetupDiEnumDeviceInterfaces(
                devices, None, ctypes.byref(guid), len(paths), ctypes.byref(data)
            ):
                paths.append(self._path(devices, data))
            return paths
        finally:
            self._setupapi.SetupDiDestroyDeviceInfoList(devices)

    def _path(self, devices: int, data: _InterfaceData) -> str:
        detail, size = self._setupapi.SetupDiGetDeviceInterfaceDetailW, ctypes.c_uint32(0)
        # The first call has no room for an answer and so fails, but says how much is needed.
        detail(devices, ctypes.byref(data), None, 0, ctypes.byref(size), None)
        buffer = (ctypes.c_ubyte * max(size.value, _DETAIL_SIZE))()
        ctypes.c_uint32.from_buffer(buffer).value = _DETAIL_SIZE
        if not detail(devices, ctypes.byref(data), ctypes.byref(buffer), size, None, None):
            raise self._error("SetupDiGetDeviceInterfaceDetailW")
        path = bytes(buffer)[ctypes.sizeof(ctypes.c_uint32) :]
        return path[: len(path) // 2 * 2].decode("utf-16-le").split("\0")[0]

    def open(self, path: str) -> WindowsDevice:
        """Opens a device for reading; raises OSError."""
        handle = self._kernel32.CreateFileW(
            path, _GENERIC_READ, _SHARE_READ_WRITE, None, _OPEN_EXISTING, 0, None
        )
        if handle is None or handle == _INVALID_HANDLE:
            raise self._error("CreateFileW")
        return WindowsDevice(self, handle)

    def control(self, handle: int, code: int, size: int) -> bytes:
        """The answer of the device behind `handle`; raises OSError."""
        buffer, returned = (ctypes.c_ubyte * size)(), ctypes.c_uint32(0)
        if not self._kernel32.DeviceIoControl(
            handle, code, None, 0, ctypes.byref(buffer), size, ctypes.byref(returned), None
        ):
            raise self._error(f"DeviceIoControl {code:#x}")
        return bytes(buffer)[: returned.value]

    def close(self, handle: int) -> None:
        self._kernel32.CloseHandle(handle)

    def _error(self, call: str) -> OSError:
        return OSError(f"{call} fails with Windows error {self._last_error()}")


class WindowsDevice:
    """An open handle."""

    def __init__(self, devices: WindowsDevices, handle: int) -> None:
        self._devices = devices
        self._handle: int | None = handle

    def control(self, code: int, size: int) -> bytes:
        """The answer to a control code, at most `size` bytes; raises OSError."""
        if self._handle is None:
            raise OSError("the device is closed")
        return self._devices.control(self._handle, code, size)

    def close(self) -> None:
        """Closes the handle; a second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._devices.close(handle)
