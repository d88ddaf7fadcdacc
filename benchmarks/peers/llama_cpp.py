"""llama.cpp as a contender: its own llama-bench and llama-batched-bench over a GGUF file of the same shape.

It is built from the copy in the llama-cpp-python source distribution, for this very processor. It draws no tokens
and has no server in these programs: the least that it could do.
"""

import json
import subprocess
from collections.abc import Mapping

from benchmarks.peers.gguf_file import write
from benchmarks.peers.protocol import PLACE, Asked

BINARIES = PLACE / "llama-build" / "bin"
_LOG = PLACE / "llama.log"


class LlamaCpp:
    """llama.cpp with one model.

    Args:
        shape: of `engine.bench.shapes`, a Llama.
        kind: of `gguf_file.KINDS`.
        threads: of all its work.
        flash: use its fused attention.
    """

    def __init__(self, shape: str, kind: str, threads: int, *, flash: bool = True) -> None:
        if not (BINARIES / "llama-bench").exists():
            raise SystemExit("llama.cpp is not built here: python -m benchmarks.peers.setup llama.cpp")
        self.name = f"llama.cpp {kind}"
        self._model = write(shape, kind, PLACE / f"{shape}-{kind}.gguf")
        self._threads = str(threads)
        self._flash = "on" if flash else "off"

    def measure(self, asked: Asked) -> Mapping[str, float]:
        """See `Contender`; a process for each, which loads the model and warms up before its clock starts."""
        if asked.kind == "prefill":
            return {"rate": self._alone("-p", f"{asked.tokens}", "-n", "0")}
        if asked.batch == 1:
            return {"rate": self._alone("-p", "0", "-n", f"{asked.tokens}", "-d", f"{asked.context}")}
        return {"rate": self._together(asked)}

    def close(self) -> None:
        """Nothing runs between measurements."""

    def _alone(self, *words: str) -> float:
        flash = "1" if self._flash == "on" else "0"
        told = self._run("llama-bench", "-t", self._threads, "-r", "1", "-fa", flash, "-o", "json", *words)
        (found,) = json.loads(told)
        return float(found["avg_ts"])

    def _together(self, asked: Asked) -> float:
        room = asked.batch * (asked.context + asked.tokens) + 64
        words = ("-npp", f"{asked.context}", "-ntg", f"{asked.tokens}", "-npl", f"{asked.batch}", "-c", f"{room}")
        threads = ("-t", self._threads, "-tb", self._threads, "-fa", self._flash, "--output-format", "jsonl")
        told = ""
        while not told:  # it prints by a thread that may end with the process before it has printed
            told = self._run("llama-batched-bench", *words, *threads).strip()
        return float(json.loads(told)["speed_tg"])

    def _run(self, program: str, *words: str) -> str:
        command = (str(BINARIES / program), "-m", str(self._model), *words)
        with _LOG.open("a") as log:
            return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=log, text=True).stdout
