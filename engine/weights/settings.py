"""Strict reading of what config.json says about quantised weights: what is not known is refused by its name."""

from typing import Any

from engine.errors import EngineError


class Settings:
    """The fields of one object, each taken once; a field that is null is as good as absent.

    Args:
        raw: the object.
        where: its name, for messages.

    Raises:
        EngineError: QUANTISATION_UNSUPPORTED; it is no object.
    """

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise unsupported(where, f"must be an object, not {str(raw)[:40]!r}")
        self.where = where
        self._left: dict[str, Any] = {name: value for name, value in raw.items() if value is not None}

    def take(self, name: str, default: object = None) -> Any:
        """The value of `name`, or the default."""
        return self._left.pop(name, default)

    def one_of(self, name: str, *allowed: object, default: object = None) -> Any:
        """The value of `name` where it is one of these; absent, the default; of no default, it must be there."""
        value = self.take(name, default)
        if not any(type(value) is type(known) and value == known for known in allowed):
            raise unsupported(self.where, f"{name} = {str(value)[:60]!r}; known: {', '.join(map(repr, allowed))}")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        return bool(self.one_of(name, True, False, default=default))

    def whole(self, name: str, most: int, default: int | None = None) -> int:
        """A whole number from 1 to `most`."""
        value = self.take(name, default)
        if type(value) is not int or not 1 <= value <= most:
            raise unsupported(self.where, f"{name} = {str(value)[:60]!r}; it must be a whole number to {most}")
        return value

    def empty(self, *names: str) -> None:
        """Take fields that change the mathematics unless they are false, empty or null."""
        for name in names:
            value = self.take(name, False)
            if value is not False and value not in ({}, [], ""):
                raise unsupported(self.where, f"{name} = {str(value)[:60]!r}")

    def ignore(self, *names: str) -> None:
        """Take fields that say how the weights were made or should be run, not what they are."""
        for name in names:
            self.take(name)

    def finish(self) -> None:
        """Refuse the fields nobody took.

        Raises:
            EngineError: QUANTISATION_UNSUPPORTED.
        """
        if self._left:
            name, value = sorted(self._left.items())[0]
            raise unsupported(self.where, f"unknown field {name[:60]} = {str(value)[:60]!r}")


def unsupported(where: str, what: str) -> EngineError:
    """The refusal of one field or value."""
    return EngineError(
        "QUANTISATION_UNSUPPORTED", f"config.json: {where}: {what}; this engine does not compute it"
    )
