"""The engine's one reader of JSON from outside: read one way only, or a refusal with a code.

Two programs that read one file must not see two things in it, so what readers disagree about is refused: a name
that occurs twice, and an encoding other than UTF-8. Numbers are for whoever uses them to check, by name.

Source: RFC 8259, sections 4 and 8.1.
"""

import json
from typing import Any

from engine.errors import EngineError


def load_object(content: bytes, name: str, code: str) -> dict[str, Any]:
    """The JSON object that `content` is.

    Args:
        content: UTF-8 without a byte order mark.
        name: of the file, for the message.
        code: of the refusal.

    Raises:
        EngineError: `code`; not JSON, nested too deeply, a name twice in one object, or no object.
    """
    parsed = load_value(content, name, code)
    if not isinstance(parsed, dict):
        raise EngineError(code, f"{name} is not a JSON object")
    return parsed


def load_value(content: bytes, name: str, code: str) -> Any:
    """The JSON value that `content` is, of whatever type; arguments and errors as `load_object`."""
    try:
        return json.loads(content.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise EngineError(code, f"{name} is nested too deeply") from None
    except ValueError as error:
        raise EngineError(code, f"{name} is not JSON, or has a name twice in one object") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result
