"""`cloister.toml` as a file: read, judged by the settings, its faults told by line, and written as an example.

Source: TOML 1.0.
"""

import difflib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
from pydantic import ValidationError

from appliance.errors import CloisterError
from appliance.settings import Settings, accepts, model_of, sections, unit_of

FILE = "cloister.toml"
_MAX_FILE_BYTES = 1 << 20
_LONGEST_SHOWN = 60
_KEY = re.compile(r'\s*"?([A-Za-z0-9_-]+)"?\s*=')
_TABLE = re.compile(r'\s*\[\s*"?([A-Za-z0-9_-]+)"?\s*\]')


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
    value: str | int | float | list[str]
    source: str
    default: str | int | float | list[str]
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
        for section, fields in sections():
            for name, field in fields.items():
                key = f"{section}.{name}"
                value = self.settings.value(section, name)
                facts = (field.default, unit_of(field), accepts(field), field.description or "")
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
    for section, fields in sections():
        lines += ["", *_comment(model_of(section).__doc__ or ""), f"[{section}]"]
        for name, field in fields.items():
            lines += ["", *_comment(field.description or ""), *_comment(f"{_sentence(accepts(field))}.")]
            lines.append(f"# {name} = {_toml(field.default)}")
    return "\n".join(lines) + "\n"


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
    return f"is {shown}, must be {accepts(model_of(section).model_fields[name.partition('.')[0]])}"


def _nearest(section: str, name: str) -> str:
    """The known setting or section that an unknown one is most like; one in another section counts, too."""
    known = {f"{s}.{n}": (s, n) for s, fields in sections() for n in fields}
    if not name:
        alike = difflib.get_close_matches(section, [s for s, _ in sections()], 1)
        homes = [key for key, (_, own) in known.items() if own == section]
        return (homes or [f"[{s}]" for s in alike] or [""])[0]
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
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
