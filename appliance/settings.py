"""What an operator may set: `cloister.toml` in the home directory, every setting with its unit, default and range.

The models here are the whole truth about a setting: the file is judged by them, and the commented example is made
from them (appliance/settings_file.py). Processes get the values as arguments (appliance/processes.py); a setting
that no process takes is not here.
"""

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

_NAME = re.compile(r"[A-Za-z0-9.-]{0,253}")
_SPDX = re.compile(r"[A-Za-z0-9.:+-]{1,128}")


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


def _spdx(text: str) -> str:
    if not _SPDX.fullmatch(text):
        raise ValueError("not an SPDX identifier")
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
    derive_mib: int = _setting(
        256,
        "Quantised weights of this size and more are packed for the processor once, before their first worker "
        "starts, and kept in `derived/`, where they are as large as in the store; smaller ones are packed at each "
        "start.",
        "MiB",
        ge=0,
        le=1 << 24,
    )


class ImportSettings(_Section):
    """What may come in, how much of it, and how the store is looked after."""

    licences: list[Annotated[str, AfterValidator(_spdx)]] = _setting(
        [],
        "Licences a model may come under; any other is refused, LICENCE_NOT_ALLOWED. An empty list allows any.",
        'a list of SPDX identifiers, such as ["Apache-2.0", "MIT"]',
    )
    quota_bytes: int = _setting(
        0,
        "Most that the store may hold; an import that would need more is refused, STORE_QUOTA. 0 leaves it to the "
        "disk.",
        "bytes",
        ge=0,
        le=1 << 60,
    )
    scrub_days: int = _setting(
        30, "Every file of the store is hashed again after so many days; 0 leaves it to `cloister bundle scrub`.",
        "days", ge=0, le=3650,
    )  # fmt: skip
    scrub_bytes_per_second: int = _setting(
        64 << 20,
        "The most that a scrub reads, so that it slows nobody down.",
        "bytes per second",
        ge=1 << 16,
        le=1 << 40,
    )


class ModelSettings(_Section):
    """How a model version is tried before an alias answers with it."""

    canary_seconds: float = _setting(
        120.0,
        "The answer to a canary that takes longer has failed; raise it for a model that is slow on this machine.",
        "seconds",
        ge=1,
        le=3600,
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
    imports: ImportSettings = Field(
        default=ImportSettings(), alias="import"
    )  # a word that Python keeps for itself
    models: ModelSettings = ModelSettings()
    devices: DeviceSettings = DeviceSettings()
    watchdog: WatchdogSettings = WatchdogSettings()
    logs: LogSettings = LogSettings()

    def changed(self) -> dict[str, str]:
        """What is not its default, by `section.name`."""
        known = Settings().model_dump(by_alias=True)
        return {
            f"{section}.{name}": str(value)
            for section, values in self.model_dump(by_alias=True).items()
            for name, value in values.items()
            if value != known[section][name]
        }

    def value(self, section: str, name: str) -> Any:
        """The value of `section.name`, as the file calls them."""
        return getattr(getattr(self, _attribute(section)), name)

    def with_listen(self, address: str) -> "Settings":
        """The same, with another address to listen on."""
        return self.model_copy(update={"gateway": self.gateway.model_copy(update={"listen": address})})


def accepts(field: FieldInfo) -> str:
    """What a setting may be, in words."""
    if get_origin(field.annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(field.annotation)))}"
    if field.annotation is str or get_origin(field.annotation) is list:
        return unit_of(field)
    least, most = (_bound(field, kind) for kind in (Ge, Le))
    kind = "a whole number" if field.annotation is int else "a number"
    unit = f" of {unit_of(field)}" if unit_of(field) else ""
    return f"{kind}{unit} from {least} to {most}"


def _bound(field: FieldInfo, kind: type[Ge] | type[Le]) -> float:
    """The range's end that pydantic keeps as `Ge` or `Le`."""
    for item in field.metadata:
        if isinstance(item, kind):
            return item.ge if isinstance(item, Ge) else item.le  # type: ignore[return-value]  # numbers, here
    return 0


def model_of(section: str) -> type[BaseModel]:
    """The model of one section."""
    field = Settings.model_fields[_attribute(section)]
    model: type[BaseModel] = field.annotation  # type: ignore[assignment]  # all are models
    return model


def sections() -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """Every section with its settings, in the file's order."""
    for name, field in Settings.model_fields.items():
        section = field.alias or name
        yield section, dict(model_of(section).model_fields)


def _attribute(section: str) -> str:
    """What a section is called in Python."""
    return next(name for name, field in Settings.model_fields.items() if section == (field.alias or name))


def unit_of(field: FieldInfo) -> str:
    """The unit of a setting's value; may be empty."""
    extra = field.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""
