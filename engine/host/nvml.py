"""NVIDIA's devices, through the vendor's own C library; a machine without it has none, and the reason is told.

The library is loaded by name and asked through ctypes: no package is needed, and nothing is touched where there is
none. Every answer is checked; what one device will not tell is left out of that device alone, and one that cannot
be described is named. Asking takes 1 to 3 s for each device that the driver has to wake first, as it
does where no persistence daemon runs (NVIDIA, "Driver Persistence").

Not tried on real hardware yet: names, signatures, structures and codes were compared with nvml.h 13.3; the tests
use a C library of their own that has the same.

Source: nvml.h 13.3 (NVML API reference, "Initialization and Cleanup", "Device Queries", "Multi Instance GPU
Management"): nvmlReturn_t, nvmlMemory_t, nvmlUtilization_t, buffer sizes.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.protos import engine_pb2

LIBRARY = "libnvidia-ml.so.1"
CUDA = "cuda"
_SUCCESS = 0
_EMPTY_PLACE = (2, 6)  # NVML_ERROR_INVALID_ARGUMENT, NVML_ERROR_NOT_FOUND: drivers say either
_TEMPERATURE_GPU = 0
_MIG_ENABLED = 1
_NAME_BYTES = 96


class NvmlError(Exception):
    """NVML did not tell what it was asked; the text says which call and why.

    Attributes:
        code: nvmlReturn_t; 0 when the function is missing.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Utilisation(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


@dataclass(frozen=True)
class Found:
    """What NVML told.

    Attributes:
        devices: whole devices, each followed by its slices.
        problem: why there are none, or why some are missing; empty when all was told.
    """

    devices: tuple[engine_pb2.Device, ...]
    problem: str


def find(library: str = LIBRARY) -> Found:
    """NVIDIA's devices on this machine, now."""
    try:
        nvml = _Nvml(ctypes.CDLL(library))
    except OSError as error:
        missing = "No such file" in str(error)
        return Found((), f"{library} is not installed" if missing else f"{library} cannot be loaded: {error}")
    except AttributeError as error:
        return Found((), f"{library} is not NVML: {error}")
    try:
        nvml.call("nvmlInit_v2")
    except NvmlError as error:
        return Found((), str(error))
    try:
        return _devices(nvml)
    except NvmlError as error:
        return Found((), str(error))
    finally:
        nvml.quietly("nvmlShutdown")


class _Nvml:
    """The library's functions by name; a return code other than success is an error."""

    def __init__(self, library: Any) -> None:
        self._library = library
        library.nvmlErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            NvmlError: it failed, or this library is too old to have it.
        """
        function = getattr(self._library, name, None)
        if function is None:
            raise NvmlError(f"{name} is missing: the driver is too old")
        code = function(*arguments)
        if code != _SUCCESS:
            said = self._library.nvmlErrorString(code) or b"unknown error"
            raise NvmlError(f"{name}: {said.decode(errors='replace')} ({code})", code)

    def quietly(self, name: str, *arguments: Any) -> bool:
        """Call a function; whether it did what it was asked."""
        try:
            self.call(name, *arguments)
        except NvmlError:
            return False
        return True

    def text(self, name: str, *before: Any) -> str:
        """What a function writes into a buffer.

        Raises:
            NvmlError: it failed.
        """
        buffer = ctypes.create_string_buffer(_NAME_BYTES)
        self.call(name, *before, buffer, ctypes.c_uint(_NAME_BYTES))
        return buffer.value.decode(errors="replace")

    def number(self, name: str, *before: Any) -> int:
        """What a function writes into an unsigned number.

        Raises:
            NvmlError: it failed.
        """
        value = ctypes.c_uint()
        self.call(name, *before, ctypes.byref(value))
        return value.value


def _devices(nvml: _Nvml) -> Found:
    """Every device that can be described; those that cannot are named in the problem."""
    found: list[engine_pb2.Device] = []
    problems: list[str] = []
    driver = nvml.text("nvmlSystemGetDriverVersion")
    for index in range(nvml.number("nvmlDeviceGetCount_v2")):
        handle = ctypes.c_void_p()
        try:
            nvml.call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
            is_sliced = _is_sliced(nvml, handle)
            whole = _device(nvml, handle, driver, is_sliced)
        except NvmlError as error:
            problems.append(f"device {index}: {error}")
            continue
        found += [whole, *(_slices(nvml, handle, whole, problems) if is_sliced else ())]
    return Found(tuple(found), "; ".join(problems))


def _device(nvml: _Nvml, handle: ctypes.c_void_p, driver: str, is_sliced: bool = False) -> engine_pb2.Device:
    """One device or slice; what a sliced device has belongs to its slices, so that it has nothing available.

    Raises:
        NvmlError: its identity or its memory is not told.
    """
    memory = _Memory()
    uuid = nvml.text("nvmlDeviceGetUUID", handle)
    ask = (
        nvml.quietly if is_sliced else nvml.call
    )  # the memory of a sliced device is told to privileged users only
    ask("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    device = engine_pb2.Device(
        id=uuid,
        kind=CUDA,
        name=nvml.text("nvmlDeviceGetName", handle),
        memory_bytes=memory.total,
        memory_available_bytes=0 if is_sliced else memory.free,
        driver=driver,
    )
    _add_what_is_told(nvml, handle, device)
    return device


def _add_what_is_told(nvml: _Nvml, handle: ctypes.c_void_p, device: engine_pb2.Device) -> None:
    """Compute capability, temperature and utilisation: slices, and some devices, do not tell them."""
    major, minor, degrees = ctypes.c_int(), ctypes.c_int(), ctypes.c_uint()
    rates = _Utilisation()
    at = (ctypes.byref(major), ctypes.byref(minor))
    if nvml.quietly("nvmlDeviceGetCudaComputeCapability", handle, *at):
        device.compute_capability = f"{major.value}.{minor.value}"
    sensor = ctypes.c_int(_TEMPERATURE_GPU)
    if nvml.quietly("nvmlDeviceGetTemperature", handle, sensor, ctypes.byref(degrees)):
        device.temperature_c = degrees.value
    if nvml.quietly("nvmlDeviceGetUtilizationRates", handle, ctypes.byref(rates)):
        device.utilisation_percent = rates.gpu


def _is_sliced(nvml: _Nvml, handle: ctypes.c_void_p) -> bool:
    """The device is in MIG mode; then nothing but its slices can be used, even where there is none."""
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    mode = (ctypes.byref(current), ctypes.byref(pending))
    return nvml.quietly("nvmlDeviceGetMigMode", handle, *mode) and current.value == _MIG_ENABLED


def _slices(
    nvml: _Nvml, handle: ctypes.c_void_p, whole: engine_pb2.Device, problems: list[str]
) -> Iterator[engine_pb2.Device]:
    """The MIG instances of a device, each as a device; places without one are passed over."""
    try:
        places = nvml.number("nvmlDeviceGetMaxMigDeviceCount", handle)
    except NvmlError as error:
        problems.append(f"slices of {whole.id}: {error}")
        return
    for place in range(places):
        try:
            instance = _slice_handle(nvml, handle, place)
            device = None if instance is None else _device(nvml, instance, whole.driver)
        except NvmlError as error:
            problems.append(f"slice {place} of {whole.id}: {error}")
            continue
        if device is not None:
            device.slice_of = whole.id
            device.compute_capability = device.compute_capability or whole.compute_capability
            yield device


def _slice_handle(nvml: _Nvml, handle: ctypes.c_void_p, place: int) -> ctypes.c_void_p | None:
    """The MIG instance in a place; None where there is none.

    Raises:
        NvmlError: it is not told which.
    """
    instance = ctypes.c_void_p()
    try:
        nvml.call("nvmlDeviceGetMigDeviceHandleByIndex", handle, ctypes.c_uint(place), ctypes.byref(instance))
    except NvmlError as error:
        if error.code in _EMPTY_PLACE:
            return None
        raise
    return instance
