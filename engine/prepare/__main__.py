"""`python -m engine.prepare`: one question on standard input, lines of progress and a last one on standard output.

Each line is a JSON object. Progress is {"stage", "done", "total"}; the last line {"ok": true, "report": {..}} or
{"ok": false, "code", "message"}. Exit status 0 either way; any other means that the files drove the process over
its limits, or somebody ended it. Whoever asked removes what is in the folder then; when that one dies, so does
this process: nobody would take what it works on for hours.

Source: prctl(2), PR_SET_PDEATHSIG.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys
import time
from typing import Any

from engine.errors import EngineError, is_out_of_memory
from engine.prepare.question import Compiling, Packing, Question, read_question

_CONVERTING_BYTES = 16 << 30  # of address space; GGUF comes from strangers, and converting needs far less
_LIMITS = ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 256))
_PR_SET_PDEATHSIG = 1
_FULL = (errno.ENOSPC, errno.EDQUOT)
_EVERY = 0.2  # seconds between lines of progress


class _Progress:
    """Writes lines of progress, not too many; one that nobody reads any more ends the process."""

    def __init__(self) -> None:
        self._stage = ""
        self._written = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage or now - self._written >= _EVERY:
            self._stage, self._written = stage, now
            write({"stage": stage, "done": done, "total": total})


def write(line: dict[str, Any]) -> None:
    """One line on standard output."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def refusal(error: OSError) -> dict[str, Any]:
    """The last line after an error of files: a full disk is no fault of the source."""
    code = "DISK_FULL" if error.errno in _FULL else "SOURCE_UNREADABLE"
    return {"ok": False, "code": code, "message": f"{error.filename}: {error.strerror}"}


def main() -> int:
    """Prepare, report, exit."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.umask(0o077)
    for which, limit in _LIMITS:
        _limit(which, limit)
    try:
        answer = {"ok": True, "report": _prepare(read_question(sys.stdin.buffer))}
    except EngineError as error:
        answer = {"ok": False, "code": error.code, "message": error.message}
    except OSError as error:
        answer = refusal(error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        answer = {
            "ok": False,
            "code": "OUT_OF_MEMORY",
            "message": "preparing the model takes more memory than there is",
        }
    write(answer)
    return 0


def _prepare(question: Question | Packing | Compiling) -> dict[str, Any]:
    """Each way imports what it needs: numpy to convert, torch to quantise and to pack, Triton to compile."""
    if isinstance(question, Packing):
        _take_cores(question)
        from engine.prepare.packing import pack

        return pack(question)
    if isinstance(question, Compiling):
        _take_cores(question.packing)
        from engine.prepare.kernels import compile_kernels

        return compile_kernels(question)
    if question.settings is None:
        _limit(resource.RLIMIT_AS, _CONVERTING_BYTES)
        from engine.prepare.converting import convert_gguf

        return convert_gguf(question.source, question.out, _Progress(), question.keep, question.keep_embeddings)
    from engine.prepare.quantising import quantise_folder

    return quantise_folder(question.source, question.out, question.settings, _Progress())


def _take_cores(packing: Packing) -> None:
    """Keep to the cores and the disk that engine-host gives."""
    _limit(resource.RLIMIT_FSIZE, packing.most_bytes)
    from engine.launch import given_cores, keep_to

    keep_to(given_cores())


def _limit(which: int, wanted: int) -> None:
    _, hard = resource.getrlimit(which)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(which, (limit, limit))


if __name__ == "__main__":
    sys.exit(main())
