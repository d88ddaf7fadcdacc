"""Asks engine-inspect, a process of its own, what a model's files are; only it parses tokenizers and templates.

It gets copies of what it reads (configuration, tokenizer, templates, the headers of weights) in one sealed piece
of memory, and on standard input a JSON list of what is where; it answers one JSON object. So it has no descriptor
of the store or the medium, whatever it is made to do. Limits are set on it before the list is sent, so nothing
hostile is read without them.
"""

import fcntl
import json
import os
import re
import resource
import select
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from bundles.content.files import ModelFiles
from bundles.content.safetensors import header_end
from bundles.content.text import MAX_TABLE
from bundles.format import strict_json
from bundles.format.errors import BundleError
from bundles.format.manifest import Kind, role_of

MAX_ANSWER = 64 * 1024
MAX_MESSAGE = 1000
MAX_PACKED = 160 * 1024 * 1024
"""Bytes that are handed over; the headers of the largest models have under 20 MB, a tokenizer at most 64 MiB."""

_CONFIG = ("config.json", "generation_config.json", "adapter_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_MODULES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_READ = frozenset({*_CONFIG, *_TOKENIZER, *_MODULES})
_OF_A_MODULE = "/config.json"  # in the folder of one of those that modules.json lists
_LISTED = frozenset({"weights", "weights-index", "config", "tokenizer", "template"})
_CODE = re.compile(r"[A-Z][A-Z0-9_]{2,63}")
# Only what is installed is imported: never a module of the current directory, which may be the bundle's medium.
_PYTHON = (sys.executable, "-P")
_ENVIRONMENT = ("PATH", "VIRTUAL_ENV", "LANG", "LC_ALL")


@dataclass(frozen=True)
class Verdict:
    """What engine-inspect found a model to be.

    Attributes:
        architecture: as config.json names it; LoRA for an adapter.
        max_context_tokens: prompt and answer together; 0 for an adapter.
        parameters: numbers in all tensors.
        dtype: number type of most of them.
        capabilities: generate, chat, embed, rerank; none of an adapter.
        facts: more for people to read, by name; nothing is decided on them.
        quantisation: how its matrices are quantised; None: they are plain.
    """

    architecture: str
    max_context_tokens: int
    parameters: int
    dtype: str
    capabilities: tuple[str, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    quantisation: str | None = None


@dataclass(frozen=True)
class Inspector:
    """How to run engine-inspect.

    Attributes:
        command: argv.
        timeout: seconds of wall time.
        cpu_seconds: processor time.
        memory: bytes of address space.
    """

    command: tuple[str, ...] = (*_PYTHON, "-m", "engine.inspect")
    timeout: float = 120.0
    cpu_seconds: int = 60
    memory: int = 8 * 2**30

    def inspect(self, files: ModelFiles, kind: Kind) -> Verdict:
        """The verdict on these files; of a draft, the one on a model.

        Raises:
            BundleError: INSPECT_FAILED, INSPECT_TIMEOUT, CONTENT_TOO_LARGE, SAFETENSORS_HEADER, or the inspector's
                own code.
        """
        with _packed(files) as (fd, listing):
            question = {"kind": "adapter" if kind == "adapter" else "model", "fd": fd, "files": listing}
            status, answer = self._run(json.dumps(question).encode(), (fd,))
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
        deadline = time.monotonic() + self.timeout
        try:
            answer = _talk(process, question, deadline)
            if len(answer) > MAX_ANSWER:
                process.kill()
            return process.wait(max(0.0, deadline - time.monotonic())), answer
        except (TimeoutError, subprocess.TimeoutExpired):
            process.kill()
            raise BundleError("INSPECT_TIMEOUT", f"engine-inspect took over {self.timeout:g} s") from None

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


def _talk(process: "subprocess.Popen[bytes]", question: bytes, deadline: float) -> bytes:
    """Hand over the question and take the answer; no more of it is taken than shows that it is too long.

    Raises:
        TimeoutError: it is not complete at `deadline`, of the monotonic clock.
    """
    unsent, answer = memoryview(question), bytearray()
    with selectors.DefaultSelector() as pipes:
        for pipe, event in ((process.stdin, selectors.EVENT_WRITE), (process.stdout, selectors.EVENT_READ)):
            os.set_blocking(pipe.fileno(), False)  # type: ignore[union-attr]  # both are pipes
            pipes.register(pipe, event)  # type: ignore[arg-type]  # both are pipes
        while len(answer) <= MAX_ANSWER:
            ready = pipes.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, event in ready:
                if event == selectors.EVENT_WRITE:
                    unsent = _send(key.fd, unsent)
                    if not unsent:
                        pipes.unregister(key.fileobj)
                        process.stdin.close()  # type: ignore[union-attr]  # it is a pipe
                elif part := os.read(key.fd, MAX_ANSWER):
                    answer += part
                else:
                    return bytes(answer)
    return bytes(answer)


def _send(fd: int, block: memoryview) -> memoryview:
    """Write some of it; what is left, nothing where nobody reads."""
    try:
        return block[os.write(fd, block[: select.PIPE_BUF]) :]
    except BrokenPipeError:
        return block[:0]


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
            "facts": dict(facts),
            "quantisation": str() | None as quantisation,
        }:
            names = tuple(map(str, capabilities))
            more = {str(name): str(value) for name, value in facts.items()}
            return Verdict(architecture, max_context_tokens, parameters, dtype, names, more, quantisation)
    raise BundleError("INSPECT_FAILED", "engine-inspect answered in an unknown form")


@contextmanager
def _packed(files: ModelFiles) -> Iterator[tuple[int, list[dict[str, object]]]]:
    """Copies of what engine-inspect reads, in memory that nobody can change, and where each file lies in it."""
    fd = os.memfd_create("model-files", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        listing: list[dict[str, object]] = []
        position = 0
        for path, size in sorted(files.sizes.items()):
            if role_of(path) not in _LISTED:
                continue
            length = _wanted(files, path)
            if position + length > MAX_PACKED:
                raise BundleError(
                    "CONTENT_TOO_LARGE", f"{path!a} and what is before it are over {MAX_PACKED} bytes"
                )
            _write(fd, files.read(path, 0, length) if length else b"")
            listing.append({"path": path, "size": size, "offset": position, "length": length})
            position += length
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        yield fd, listing
    finally:
        os.close(fd)


def _wanted(files: ModelFiles, path: str) -> int:
    """How many bytes of a file are read, from its beginning."""
    size = files.sizes[path]
    if path.lower().endswith(".safetensors"):
        return header_end(files.read(path, 0, 8), size, path)
    wanted = path in _READ or path.endswith(_OF_A_MODULE) or path.lower().endswith(".jinja")
    if wanted and size > MAX_TABLE:
        raise BundleError("CONTENT_TOO_LARGE", f"{path!a} has {size} bytes, over {MAX_TABLE}")
    return size if wanted else 0


def _write(fd: int, block: bytes) -> None:
    done = 0
    while done < len(block):
        done += os.write(fd, memoryview(block)[done:])
