"""The engine's errors: of a request, with a stable code; of the engine as a whole; and how lost memory looks."""


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


class EngineLostError(Exception):
    """The engine computes nothing any more, for anybody; only a new process may."""


def is_out_of_memory(error: BaseException) -> bool:
    """torch has an exception of its own for devices, and for the CPU only words (c10/core/impl/alloc_cpu.cpp)."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )
