"""Asks engine-inspect, a process of its own, what a model's files are; only it parses tokenizers and templates.

It gets open, read-only descriptors and a JSON list of them on standard input, and answers one JSON object. Limits
are set on it before the list is sent, so nothing hostile is read without them.
"""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from bundles.format import strict_json
from bundles.format.errors import BundleError

MAX_ANSWER = 64 * 1024
MAX_MESSAGE = 1000
_CODE = re.compile(r"[A-Z][A-Z0-9_]{2,63}")
# Only what is installed is imported: never a module of the current directory, which may be the bundle's medium.
_PYTHON = (sys.executable, "-P")
_ENVIRONMENT = ("PATH", "VIRTUAL_ENV", "LANG", "LC_ALL")


@dataclass(frozen=True)
class Verdict:
    """What engine-inspect found a model to be."""

    architecture: str
    max_context_tokens: int
    parameters: int
    dtype: str
    capabilities: tuple[str, ...]


@dataclass(frozen=True)
class Inspector:
    """How to run engine-inspect.

    Attributes:
        command: argv.
        timeout: seconds of wall time.
        cpu_seconds: processor time.
        memory: bytes of address space.
    """

    command: tuple[str, ...] = (*_PYTHON, "-m", "engine.inspect", "--folder-json", "-")
    timeout: float = 120.0
    cpu_seconds: int = 60
    memory: int = 8 * 2**30

    def inspect(self, files: Mapping[str, int]) -> Verdict:
        """The verdict on the files behind these descriptors, by path in the model's folder.

        Raises:
            BundleError: INSPECT_FAILED, INSPECT_TIMEOUT, or the inspector's own code.
        """
        listing = [{"path": path, "fd": fd} for path, fd in files.items()]
        status, answer = self._run(json.dumps({"files": listing}).encode(), tuple(files.values()))
        if status != 0 or len(answer) > MAX_ANSWER:
            raise BundleError("INSPECT_FAILED", f"engine-inspect ended with status {status} and no usable verdict")
        try:
            verdict = strict_json.parse_object(answer, "the verdict of engine-inspect", any_number=True)
        except BundleError as error:
            raise BundleError("INSPECT_FAILED", error.message) from None
        return _read(verdict)

    def _run(self, question: bytes, descriptors: tuple[int, ...]) -> tuple[int, bytes]:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            with subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=descriptors,
                env=environment,
                start_new_session=True,
            ) as process:
                return self._ask(process, question)
        except OSError as error:
            raise BundleError("INSPECT_FAILED", f"engine-inspect cannot be started: {error.strerror}") from None

    def _ask(self, process: "subprocess.Popen[bytes]", question: bytes) -> tuple[int, bytes]:
        self._limit(process.pid)
        try:
            answer, _ = process.communicate(question, timeout=self.timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise BundleError("INSPECT_TIMEOUT", f"engine-inspect took over {self.timeout:g} s") from None
        return process.returncode, answer

    def _limit(self, pid: int) -> None:
        limits = (
            (resource.RLIMIT_AS, self.memory),
            (resource.RLIMIT_CPU, self.cpu_seconds),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_CORE, 0),
        )
        try:
            for which, value in limits:
                resource.prlimit(pid, which, (value, value))
        except ProcessLookupError:
            return  # it ended by itself; its status tells


def _read(verdict: Mapping[str, object]) -> Verdict:
    match verdict:
        case {"ok": False, "code": str(code), "message": str(message)} if _CODE.fullmatch(code):
            raise BundleError(code, message[:MAX_MESSAGE])
        case {
            "ok": True,
            "architecture": str(architecture),
            "max_context_tokens": int(max_context_tokens),
            "parameters": int(parameters),
            "dtype": str(dtype),
            "capabilities": list(capabilities),
        }:
            return Verdict(architecture, max_context_tokens, parameters, dtype, tuple(map(str, capabilities)))
    raise BundleError("INSPECT_FAILED", "engine-inspect answered in an unknown form")
