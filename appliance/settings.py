"""What an operator may set: `cloister.toml` in the home directory, every setting with its unit, default and range.

The models here are the whole truth about a setting: the file is judged by them, `cloister config` prints them, and
the commented example that `cloister init` writes is made from them. Processes get the values as arguments
(appliance/processes.py); a setting that no process takes is not here.

Source: TOML 1.0.
"""

import difflib
import ipaddress
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import grpc
from annotated_types import Ge, Le
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from appliance.errors import CloisterError

FILE = "cloister.toml"
_MAX_FILE_BYTES = 1 << 20
_LONGEST_SHOWN = 60
_KEY = re.compile(r'\s*"?([A-Za-z0-9_-]+)"?\s*=')
_NAME = re.compile(r"[A-Za-z0-9.-]{0,253}")
_TABLE = re.compile(r'\s*\[\s*"?([A-Za-z0-9_-]+)"?\s*\]')


def split_address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, an IPv6 host in brackets.

    Raises:
        ValueError: it is not of that form.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{text!r} is not HOST:PORT; an IPv6 host stands in brackets")
    return host, int(port)


def _address(text: str) -> str:
    split_address(text)
    return text


def _host(text: str) -> str:
    if text.startswith("[") and text.endswith("]"):
        ipaddress.IPv6Address(text[1:-1])
    elif not _NAME.fullmatch(text):
        raise ValueError("not a host")
    return text


def _file(text: str) -> str:
    if text and not (Path(text).is_absolute() and Path(text).is_file()):
        raise ValueError("not a file")
    return text


def _setting(default: Any, effect: str, unit: str = "", **bounds: Any) -> Any:
    """One setting: its default, what it does, its unit, and `ge` and `le` for the range."""
    return Field(default, description=effect, json_schema_extra={"unit": unit}, **bounds)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class GatewaySettings(_Section):
    """The network's side: where clients connect, and how much of everything one may have."""

    listen: Annotated[str, AfterValidator(_address)] = _setting(
        "127.0.0.1:8443", "Where clients connect; port 0 takes a free one.", "HOST:PORT, an IPv6 host in brackets"
    )
    advertise: Annotated[str, AfterValidator(_host)] = _setting(
        "",
        "The host that `cloister key issue` writes into credentials; empty takes the one listened on, or this "
        "machine's name where that is every address. The gateway's certificate must name it (`cloister init "
        "--listen-name`).",
        "a host name or address, IPv6 in brackets",
    )
    max_streams: int = _setting(
        512, "Requests answered at once, of all tenants; one more is refused, GATEWAY_BUSY.", ge=1, le=8192
    )
    max_calls_per_certificate: int = _setting(
        128,
        "Calls that one certificate may have open; one more is refused, TOO_MANY_CALLS. A connection carries at "
        "most 256.",
        ge=1,
        le=4096,
    )
    max_request_bytes: int = _setting(
        1 << 20, "Longest request; a longer one is refused, REQUEST_TOO_LARGE.", "bytes", ge=1024, le=1 << 20
    )
    request_seconds: float = _setting(
        5.0,
        "A call that has not delivered its request by then is refused, REQUEST_LATE.",
        "seconds",
        ge=0.1,
        le=60,
    )
    default_deadline_seconds: float = _setting(
        120.0, "Deadline of a request whose client set none.", "seconds", ge=1, le=86_400
    )
    stall_seconds: float = _setting(
        30.0,
        "A client that takes none of its answer for so long is cut off, SLOW_CLIENT.",
        "seconds",
        ge=0.1,
        le=3600,
    )
    drain_seconds: float = _setting(
        10.0,
        "When the appliance stops, running requests may finish for so long; then they end, GATEWAY_STOPPING.",
        "seconds",
        ge=0,
        le=3600,
    )


class AuditSettings(_Section):
    """The audit log."""

    wait_seconds: float = _setting(
        2.0,
        "A record that is not on the disk by then refuses what depends on it, AUDIT_BLOCKED; raise it for a slow "
        "disk.",
        "seconds",
        ge=0.1,
        le=10,
    )


class TenantSettings(_Section):
    """What a tenant or key gets for which nothing else is said; those that are there already stay as they are."""

    max_concurrent: int = _setting(16, "Requests of one tenant on their way at once.", ge=1, le=4096)
    weight: int = _setting(100, "Share of a busy machine, relative to the other tenants.", ge=1, le=1000)
    key_days: int = _setting(90, "Days until a key and its certificate expire.", "days", ge=1, le=825)


class DeviceSettings(_Section):
    """The devices that models run on."""

    inventory: Annotated[str, AfterValidator(_file)] = _setting(
        "",
        "A recorded inventory, as `cloister gpu list --json` prints it, instead of this machine's own devices: "
        "for planning, and shown as recorded wherever devices are shown.",
        "the absolute path of a file",
    )


class WatchdogSettings(_Section):
    """When a process that stands still is killed and started again."""

    heard_seconds: float = _setting(
        20.0, "A process that gives no sign of life for so long is killed.", "seconds", ge=15, le=3600
    )
    step_seconds: float = _setting(
        120.0,
        "A worker whose engine takes longer for one step gives no more signs of life; raise it for a model whose "
        "steps are long on this machine.",
        "seconds",
        ge=2,
        le=86_400,
    )
    load_seconds: float = _setting(
        1800.0,
        "A deployment that is not ready by then has failed, LOAD_TIMEOUT; raise it for a slow disk.",
        "seconds",
        ge=10,
        le=86_400,
    )


class LogSettings(_Section):
    """The processes' logs, one file each in `logs/`."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _setting(
        "INFO", "What is logged, from this level up; CLOISTER_LOG in the environment goes first."
    )
    max_bytes: int = _setting(
        8 << 20, "A file that would grow beyond this is put aside as NAME.log.1.", "bytes", ge=65_536, le=1 << 30
    )
    kept: int = _setting(3, "Files put aside and kept, of each process.", ge=0, le=99)


class Settings(_Section):
    """All sections of the file."""

    gateway: GatewaySettings = GatewaySettings()
    audit: AuditSettings = AuditSettings()
    tenants: TenantSettings = TenantSettings()
    devices: DeviceSettings = DeviceSettings()
    watchdog: WatchdogSettings = WatchdogSettings()
    logs: LogSettings = LogSettings()

    def changed(self) -> dict[str, str]:
        """What is not its default, by `section.name`."""
        known = Settings().model_dump()
        return {
            f"{section}.{name}": str(value)
            for section, values in self.model_dump().items()
            for name, value in values.items()
            if value != known[section][name]
        }

    def with_listen(self, address: str) -> "Settings":
        """The same, with another address to listen on."""
        return self.model_copy(update={"gateway": self.gateway.model_copy(update={"listen": address})})


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting as it stands.

    Attributes:
        key: `section.name`.
        source: where the value is from: default, file, environment or flag.
        unit: of the value; may be empty.
        accepts: what the value may be, in words.
        effect: what it does.
    """

    key: str
    value: str | int | float
    source: str
    default: str | int | float
    unit: str
    accepts: str
    effect: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """Settings, and where each that is not the default comes from."""

    settings: Settings
    sources: Mapping[str, str]

    def entries(self) -> Iterator[Entry]:
        """Every setting, in the file's order."""
        for section, fields in _sections():
            for name, field in fields.items():
                key = f"{section}.{name}"
                value = getattr(getattr(self.settings, section), name)
                facts = (field.default, _unit(field), accepts(field), field.description or "")
                yield Entry(key, value, self.sources.get(key, "default"), *facts)


def load(path: Path, flags: Mapping[str, str | int | float] | None = None) -> Configuration:
    """The settings in effect: the file's where there is one, then the environment's, then the flags'.

    Args:
        path: the file; one that is not there sets nothing.
        flags: by `section.name`; those not given are left out.

    Raises:
        CloisterError: CONFIG_INVALID, with every fault found.
    """
    text = _read(path)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _invalid(path, [f"not TOML: {error}"]) from None
    sources = {f"{section}.{name}": "file" for section, fields in table.items() for name in _names(fields)}
    overriding = [("environment", _environment()), ("flag", flags or {})]
    for source, values in overriding:
        for key, value in values.items():
            section, _, name = key.partition(".")
            if isinstance(table.setdefault(section, {}), dict):
                table[section][name], sources[key] = value, source
    try:
        settings = Settings.model_validate(table)
    except ValidationError as error:
        raise _invalid(path, _faults(error, text, sources)) from None
    if fault := _fault_of_inventory(settings.devices.inventory):
        raise _invalid(path, [f"{_place('devices.inventory', text, sources)[1]}devices.inventory: {fault}"])
    return Configuration(settings, sources)


def example() -> str:
    """A file that sets nothing and says everything: each setting with effect, range and default, commented out."""
    lines = [
        "# Settings of this appliance. `cloister serve` reads them when it starts; what is commented out has the",
        "# value shown. `cloister config check` judges the file, `cloister config show` prints what is in effect.",
    ]
    for section, fields in _sections():
        lines += ["", *_comment(_model(section).__doc__ or ""), f"[{section}]"]
        for name, field in fields.items():
            lines += ["", *_comment(field.description or ""), *_comment(f"{_sentence(accepts(field))}.")]
            lines.append(f"# {name} = {_toml(field.default)}")
    return "\n".join(lines) + "\n"


def accepts(field: FieldInfo) -> str:
    """What a setting may be, in words."""
    if get_origin(field.annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(field.annotation)))}"
    if field.annotation is str:
        return _unit(field)
    least, most = (_bound(field, kind) for kind in (Ge, Le))
    kind = "a whole number" if field.annotation is int else "a number"
    unit = f" of {_unit(field)}" if _unit(field) else ""
    return f"{kind}{unit} from {least} to {most}"


def _bound(field: FieldInfo, kind: type[Ge] | type[Le]) -> float:
    """The range's end that pydantic keeps as `Ge` or `Le`."""
    for item in field.metadata:
        if isinstance(item, kind):
            return item.ge if isinstance(item, Ge) else item.le  # type: ignore[return-value]  # numbers, here
    return 0


def _model(section: str) -> type[BaseModel]:
    model: type[BaseModel] = Settings.model_fields[section].annotation  # type: ignore[assignment]  # all are models
    return model


def _sections() -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    for section in Settings.model_fields:
        yield section, dict(_model(section).model_fields)


def _unit(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise _invalid(path, [f"cannot be read: {error.strerror}"]) from None
    if len(raw) > _MAX_FILE_BYTES:
        raise _invalid(path, [f"longer than {_MAX_FILE_BYTES} bytes"])
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _invalid(path, [f"not UTF-8 from byte {error.start} on"]) from None


def _environment() -> dict[str, str]:
    level = os.environ.get("CLOISTER_LOG")
    return {"logs.level": level} if level else {}


def _names(fields: object) -> list[str]:
    return list(fields) if isinstance(fields, dict) else []


def _invalid(path: Path, faults: list[str]) -> CloisterError:
    told = faults[0] if len(faults) == 1 else f"{len(faults)} faults" + "".join(f"\n  {f}" for f in faults)
    return CloisterError(
        "CONFIG_INVALID",
        f"{path}: {told}\n`cloister config example` shows every setting",
        grpc.StatusCode.FAILED_PRECONDITION,
        {"file": str(path), "faults": str(len(faults))},
    )


def _faults(error: ValidationError, text: str, sources: Mapping[str, str]) -> list[str]:
    """Each fault with its line, its key and what to do, in the file's order."""
    found = []
    for fault in error.errors():
        key = ".".join(map(str, fault["loc"]))
        line, where = _place(key, text, sources)
        found.append((line, f"{where}{key}: {_reason(fault['type'], key, fault['input'])}"))
    return [words for _, words in sorted(found, key=lambda item: item[0])]


def _fault_of_inventory(file: str) -> str:
    """What engine-host's own reader finds wrong with a recorded inventory; empty for nothing, and for no file."""
    if not file:
        return ""
    command = [sys.executable, "-P", "-m", "engine.host.inventory", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stderr.strip().splitlines() or [f"cannot be judged, exit status {done.returncode}"]
    return said[-1] if done.returncode else ""


def _place(key: str, text: str, sources: Mapping[str, str]) -> tuple[int, str]:
    """Where a setting was given: the line, 0 for none, and the words for it."""
    source = sources.get(key, "file")
    if source != "file":
        return 0, f"{source}: "
    line = _line(text, key)
    return line, f"line {line}: " if line else ""


def _reason(kind: str, key: str, value: object) -> str:
    section, _, name = key.partition(".")
    if kind == "extra_forbidden":
        nearest = _nearest(section, name)
        return "no such setting" + (f"; did you mean {nearest}?" if nearest else "; remove it")
    if not name:
        return f"is a table, [{section}]"
    shown = repr(value)
    shown = shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}…"
    return f"is {shown}, must be {accepts(_model(section).model_fields[name])}"


def _nearest(section: str, name: str) -> str:
    """The known setting or section that an unknown one is most like; one in another section counts, too."""
    known = {f"{s}.{n}": (s, n) for s, fields in _sections() for n in fields}
    if not name:
        sections = difflib.get_close_matches(section, Settings.model_fields, 1)
        homes = [key for key, (_, own) in known.items() if own == section]
        return (homes or [f"[{s}]" for s in sections] or [""])[0]
    elsewhere = [key for key, (_, own) in known.items() if own == name]
    return (elsewhere or difflib.get_close_matches(f"{section}.{name}", known, 1) or [""])[0]


def _line(text: str, key: str) -> int:
    """The line that sets `section.name` or opens `[section]`; 0 where it is written in another way."""
    wanted, _, name = key.partition(".")
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if table := _TABLE.match(line):
            section = table[1]
        here = (section, "") if table else ("", "")
        if found := _KEY.match(line):
            here = (section, found[1]) if section else (found[1], "")
        if here == (wanted, name):
            return number
    return 0


def _comment(words: str) -> list[str]:
    """Words as comment lines of at most 110 characters."""
    lines, line = [], "#"
    for word in words.split():
        if len(line) + 1 + len(word) > 110:
            lines.append(line)
            line = "#"
        line += f" {word}"
    return [*lines, line]


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
