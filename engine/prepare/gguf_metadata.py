"""The metadata of a GGUF file read strictly: a key of the model that nobody asked for is refused by name."""

from collections.abc import Mapping
from typing import Any

from engine.errors import EngineError

_SHOWN = 80


class Metadata:
    """Values by key; remembers which keys were asked for.

    Args:
        values: as `gguf.read_container` found them.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._read: set[str] = set()

    def integer(self, key: str, default: int | None = None, *, most: int = 2**31) -> int:
        """A number from 0 to `most`.

        Raises:
            EngineError: GGUF_INVALID; it is missing or no such number.
        """
        value = self._get(key, default)
        if type(value) is not int or not 0 <= value <= most:
            raise _wrong(key, f"is no integer from 0 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; as float32 holds it, in its shortest decimal form.

        Raises:
            EngineError: GGUF_INVALID.
        """
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise _wrong(key, "is no positive number")
        return float(f"{value:.7g}")

    def text(self, key: str, default: str | None = None) -> str:
        """A text.

        Raises:
            EngineError: GGUF_INVALID.
        """
        value = self._get(key, default)
        if not isinstance(value, str):
            raise _wrong(key, "is no text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean.

        Raises:
            EngineError: GGUF_INVALID.
        """
        value = self._get(key, default)
        if type(value) is not bool:
            raise _wrong(key, "is neither true nor false")
        return value

    def numbers(self, key: str) -> list[Any]:
        """A list of numbers; empty where there is none.

        Raises:
            EngineError: GGUF_INVALID.
        """
        return self._list(key, (int, float))

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty where there is none.

        Raises:
            EngineError: GGUF_INVALID.
        """
        return self._list(key, (str,))

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return key in self._values

    def refuse_unread(self, prefix: str) -> None:
        """Refuse a key below `prefix` that nobody asked for.

        Raises:
            EngineError: GGUF_UNSUPPORTED, naming it.
        """
        for key in sorted(self._values.keys() - self._read):
            if key.startswith(prefix):
                raise EngineError("GGUF_UNSUPPORTED", f"the key {key[:_SHOWN]} is not known to the conversion")

    def _list(self, key: str, types: tuple[type, ...]) -> list[Any]:
        values = self._get(key, [])
        if not isinstance(values, list) or any(type(value) not in types for value in values):
            raise _wrong(key, "is no list of that kind")
        return values

    def _get(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self._values.get(key, default)
        if value is None:
            raise _wrong(key, "is missing")
        return value


def _wrong(key: str, what: str) -> EngineError:
    return EngineError("GGUF_INVALID", f"the key {key[:_SHOWN]} {what}")
