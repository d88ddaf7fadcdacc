"""The one error of the engine: a stable code and what was wrong, for whoever carries it further."""


class EngineError(Exception):
    """A refusal or a failure inside the engine.

    Attributes:
        code: stable, UPPER_SNAKE_CASE; programs switch on it.
        message: what was wrong, where, and what to do; never text of a request.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
