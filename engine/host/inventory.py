"""The devices of a machine that a model can run on: measured here and now, or as a file has recorded them.

A recorded inventory is one JSON object, as `cloister gpu list --json` prints it:

    {"devices": [{"id": "cpu", "kind": "cpu", "name": "...", "memory_bytes": 1, "memory_available_bytes": 1,
                  "cores": 1}, ...], "recorded_from": "", "nvml": ""}

A device may also have compute_capability, driver and slice_of (text), temperature_c and utilisation_percent
(numbers), and deployments, which is passed over. The first device is the CPU, and ids are unique. Anything else is
refused. `python -m engine.host.inventory FILE` judges a file and does nothing else.

Source: proc_cpuinfo(5).
"""

import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.cores import usable_cores
from engine.errors import EngineError
from engine.host import nvml
from engine.memory import available_bytes, total_bytes
from engine.options import CPU
from engine.protos import engine_pb2
from engine.strict_json import load_object

_KINDS = (CPU, nvml.CUDA)
_TEXTS = ("id", "kind", "name", "compute_capability", "driver", "slice_of")
_NUMBERS = {
    "memory_bytes": 2**60,
    "memory_available_bytes": 2**60,
    "cores": 2**16,
    "temperature_c": 1000,
    "utilisation_percent": 100,
}
_ALWAYS = {"id", "kind", "name", "memory_bytes", "memory_available_bytes"}
_MAX_FILE_BYTES = 1 << 20
_MAX_TEXT = 256


@dataclass(frozen=True)
class Inventory:
    """The devices, the CPU first.

    Attributes:
        devices: all of them.
        recorded_from: path of the file they come from; empty when they were measured now.
        nvml: why NVIDIA's library told nothing; empty when it did.
    """

    devices: tuple[engine_pb2.Device, ...]
    recorded_from: str = ""
    nvml: str = ""

    @property
    def cpu(self) -> engine_pb2.Device:
        """The device that models run on where nobody names another."""
        return self.devices[0]


def measure(library: str = nvml.LIBRARY) -> Inventory:
    """The devices of this machine, now."""
    found = nvml.find(library)
    return Inventory((cpu_device(), *found.devices), nvml=found.problem)


def find_device(wanted: str, recorded: Inventory | None = None) -> engine_pb2.Device:
    """The device with this id, as it is now or was recorded; empty is the CPU, and for it alone no other is asked.

    Raises:
        EngineError: DEVICE_NOT_FOUND.
    """
    if wanted in ("", CPU):
        return recorded.cpu if recorded else cpu_device()
    now = recorded or measure()
    found = next((device for device in now.devices if device.id == wanted), None)
    if found is None:
        why = f" ({now.nvml})" if now.nvml else ""
        raise EngineError("DEVICE_NOT_FOUND", f"there is no device {wanted}{why}; `cloister gpu list` names them")
    return found


def cpu_device(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> engine_pb2.Device:
    """The CPU, with the cores and the memory this process may use."""
    return engine_pb2.Device(
        id=CPU,
        kind=CPU,
        name=_cpu_name(proc / "cpuinfo"),
        memory_bytes=total_bytes(proc, cgroup),
        cores=usable_cores(proc, cgroup),
        memory_available_bytes=available_bytes(proc, cgroup),
    )


def read_recorded(path: Path) -> Inventory:
    """The inventory that a file has recorded.

    Raises:
        EngineError: INVENTORY_INVALID; the message names the device and the field.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise _invalid(path, f"it has more than {_MAX_FILE_BYTES} bytes")
    fields = load_object(content, str(path), "INVENTORY_INVALID")
    unknown = sorted(fields.keys() - {"devices", "recorded_from", "nvml"})
    given = fields.get("devices")
    if unknown or not isinstance(given, list) or not given:
        raise _invalid(path, f"unknown field {unknown[0]}" if unknown else "devices must be a list of devices")
    devices = tuple(_recorded_device(path, number, device) for number, device in enumerate(given, 1))
    if devices[0].id != CPU or devices[0].kind != CPU:
        raise _invalid(path, "the first device must be the CPU, with id and kind cpu")
    if len({device.id for device in devices}) != len(devices):
        raise _invalid(path, "two devices have the same id")
    reason = fields.get("nvml", "")
    if not isinstance(reason, str):
        raise _invalid(path, "nvml must be text")
    return Inventory(devices, str(path), reason)


def _recorded_device(path: Path, number: int, given: object) -> engine_pb2.Device:
    if not isinstance(given, dict):
        raise _invalid(path, f"device {number} is no object")
    fields = {name: value for name, value in given.items() if name != "deployments"}
    missing = sorted(_ALWAYS - fields.keys())
    if missing:
        raise _invalid(path, f"device {number} lacks {missing[0]}")
    for name, value in fields.items():
        _check_field(path, f"device {number}: {name}", name, value)
    device = engine_pb2.Device(**fields)
    if device.kind not in _KINDS or device.memory_available_bytes > device.memory_bytes or not device.id:
        raise _invalid(
            path,
            f"device {number} needs an id, a kind of {', '.join(_KINDS)}, and no more free memory than all",
        )
    return device


def _check_field(path: Path, where: str, name: str, value: Any) -> None:
    if name in _TEXTS:
        if not isinstance(value, str) or len(value) > _MAX_TEXT:
            raise _invalid(path, f"{where} must be text of at most {_MAX_TEXT} characters")
    elif name in _NUMBERS:
        if type(value) is not int or not 0 <= value <= _NUMBERS[name]:
            raise _invalid(path, f"{where} must be a whole number up to {_NUMBERS[name]}")
    else:
        raise _invalid(path, f"{where} is no field of a device")


def _invalid(path: Path, what: str) -> EngineError:
    return EngineError(
        "INVENTORY_INVALID", f"{path} is no recorded inventory: {what}; `cloister gpu list --json` makes one"
    )


def _cpu_name(cpuinfo: Path) -> str:
    """The vendor's name of the first core; the architecture where the kernel gives none, as on ARM."""
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def main(argv: list[str]) -> int:
    """Judge the file named; 0 when it is a recorded inventory, else 1 with the reason on standard error."""
    try:
        read_recorded(Path(argv[0]))
    except (EngineError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
