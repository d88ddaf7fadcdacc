"""`python -m engine.inspect`: one question on standard input, one verdict on standard output.

The verdict is one JSON object: {"ok": true, ...} with what the model or adapter is, or {"ok": false, "code",
"message"}. Exit status 0 either way; any other means that the files drove the process over its limits, and is a
refusal too.
"""

import dataclasses
import json
import resource
import sys

from engine.errors import EngineError
from engine.inspect import adapter, verdict
from engine.inspect.folder import read_question
from engine.inspect.verdict import Verdict

_LIMITS = ((resource.RLIMIT_AS, 4 << 30), (resource.RLIMIT_CPU, 60), (resource.RLIMIT_CORE, 0))
_FORBIDDEN = "torch"


def main() -> int:
    """Judge, print, exit."""
    _limit()
    try:
        answer = {"ok": True, **dataclasses.asdict(_judge())}
        if _FORBIDDEN in sys.modules:
            raise EngineError("FORBIDDEN_MODULE", f"engine-inspect must never load {_FORBIDDEN}")
    except EngineError as error:
        answer = {"ok": False, "code": error.code, "message": error.message}
    except MemoryError:
        answer = {"ok": False, "code": "INSPECT_TOO_COSTLY", "message": "judging the files takes too much memory"}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def _judge() -> Verdict:
    question = read_question(sys.stdin.buffer)
    return adapter.judge(question.folder) if question.kind == "adapter" else verdict.judge(question.folder)


def _limit() -> None:
    """No more memory and processor time than these, or than whoever started this process allows."""
    for which, wanted in _LIMITS:
        _, hard = resource.getrlimit(which)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(which, (limit, limit))


if __name__ == "__main__":
    sys.exit(main())
