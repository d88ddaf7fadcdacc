"""How a comparison asks an engine: a question a line, an answer a line, so that none has to live in our process.

A process that is asked nothing computes nothing, and its model stays in memory; so engines take turns within
seconds. Needs the standard library alone: it runs in the virtual environments of others, too.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

ROOT = Path(__file__).resolve().parents[2]
PLACE = Path(os.environ.get("CLOISTER_PEERS", "/var/tmp/peers"))  # noqa: S108  # of whoever measures, and large
"""Where engines are built and their models are written."""

_READY = "ready"


class Asked(NamedTuple):
    """One measurement.

    Attributes:
        kind: "prefill", `tokens` of one prompt; or "decode", `tokens` for each of `batch` answers at once.
        tokens: see there.
        batch: answers at once.
        context: tokens of each prompt, which are computed before the clock starts.
    """

    kind: str
    tokens: int
    batch: int = 1
    context: int = 32

    def __str__(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.tokens}"
        return f"decode b{self.batch}" + (f" at {self.context}" if self.context > 32 else "")


class Contender(Protocol):
    """An engine with a model."""

    name: str

    def measure(self, asked: Asked) -> Mapping[str, float]:
        """ "rate", in tokens per second, and whatever else it tells."""

    def close(self) -> None:
        """Give everything back."""


class ProcessContender:
    """An engine in a process of its own, which runs `answer`.

    Args:
        name: for people.
        command: what to start.
        environment: beside this process's own.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read(_READY)

    def measure(self, asked: Asked) -> Mapping[str, float]:
        """See `Contender`."""
        assert self._process.stdin is not None  # noqa: S101  # Popen was told to open it
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._read("rate")

    def close(self) -> None:
        """End the process; one that computes on is killed."""
        assert self._process.stdin is not None  # noqa: S101  # as above
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, name: str) -> dict[str, Any]:
        """The next object with a field `name`; what else an engine prints is passed over."""
        assert self._process.stdout is not None  # noqa: S101  # as above
        for line in self._process.stdout:
            if line.startswith("{"):
                told: dict[str, Any] = json.loads(line)
                if name in told:
                    return told
        raise RuntimeError(f"{self.name} ended: status {self._process.wait()}")


def answer(measure: Callable[[Asked], Mapping[str, float]]) -> None:
    """In an engine's process: be asked until nobody asks any more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints from now on does not come between the answers
    print(json.dumps({_READY: True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(dict(measure(Asked(*json.loads(line))))), file=out, flush=True)
