"""How the command line prints: text for people, JSON for programs, never an escape sequence it did not make."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from admin_tui.terminal import printable as printable
from admin_tui.terminal import printable_text as printable_text
from admin_tui.units import size as size
from appliance.cli.failure import Failure

if TYPE_CHECKING:
    from google.protobuf.message import Message


def emit(args: argparse.Namespace, value: object, text: str) -> None:
    """Print one result: `value` as JSON with --json, else `text`, whose foreign parts are `printable` already."""
    if args.json:
        print(json.dumps(value, indent=2))
    elif text:
        print(_encodable(text))


def emit_line(args: argparse.Namespace, value: object, text: str) -> None:
    """Print one of many results as it comes: a line of JSON, or a line of text."""
    print(json.dumps(value) if args.json else _encodable(text), flush=True)


def emit_error(as_json: bool, failure: Failure) -> None:
    """Print a failure on standard error."""
    if as_json:
        error = {"code": failure.code, "message": failure.message, "metadata": dict(failure.metadata)}
        print(json.dumps({"error": error}), file=sys.stderr)
    else:
        text = printable_text(f"error: {failure.code}: {failure.message}")
        print(_encodable(text), file=sys.stderr)


def write_text(text: str) -> None:
    """Write a piece of a model's answer, at once."""
    sys.stdout.write(_encodable(printable_text(text)))
    sys.stdout.flush()


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right. Control characters are spelled out."""
    cells = [[printable(_cell(value)) for value in row] for row in rows]
    numeric = [
        bool(cells) and all(row[i].replace(",", "").isdecimal() for row in cells) for i in range(len(header))
    ]
    widths = [max(len(header[i]), *(len(row[i]) for row in cells), 0) for i in range(len(header))]
    lines = []
    for row in ([name.upper() for name in header], *cells):
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def plain(message: "Message") -> dict[str, Any]:
    """A protobuf message as JSON-able values: field names as declared, bytes as hex, times as RFC 3339 text."""
    return {f.name: _plain_field(message, f) for f in message.DESCRIPTOR.fields if _is_shown(message, f)}


def _encodable(text: str) -> str:
    """`text` in what the terminal's locale can show; the rest spelled out."""
    encoding = sys.stdout.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if value not in (None, "") else "-"


def _is_shown(message: "Message", field: Any) -> bool:
    """A field with presence is shown when set; any other always."""
    return not field.has_presence or message.HasField(field.name)


def _plain_field(message: "Message", field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_plain_value(item) for item in value]
    return _plain_value(value)


def _plain_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if not hasattr(value, "DESCRIPTOR"):
        return value
    if value.DESCRIPTOR.full_name == "google.protobuf.Timestamp":
        return value.ToJsonString()
    if value.DESCRIPTOR.full_name == "google.protobuf.Duration":
        return value.ToTimedelta().total_seconds()
    return plain(value)
