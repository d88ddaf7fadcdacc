"""Has engine-prepare, a process of its own, make the folder that a bundle is built from: from GGUF, or quantised.

What it makes lies in a hidden folder beside the bundle until the bundle is written, and is removed then, or when
building fails or is interrupted; what a killed build left, the next one in the same place removes. Only
engine-prepare parses what it converts; it ends with the process that asked.
"""

import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bundles.builder import sources
from bundles.builder.writing import check_place
from bundles.format import strict_json
from bundles.format.chunks import CHUNK_SIZE
from bundles.format.container import open_file
from bundles.format.errors import BundleError
from bundles.pipeline import Progress, Report, State

GGUF = ".gguf"
_BLOCK = 4 * 1024 * 1024
_MAX_LINE = 64 * 1024 * 1024  # the report of a mixture has a line for each of its experts' matrices
_MAX_MESSAGE = 1000
_CODE = re.compile(r"[A-Z][A-Z0-9_]{2,63}")
_CONVERTING_MEMORY = 16 * 2**30  # bytes of address space; GGUF files come from strangers
_PLACE = re.compile(r"\..{1,40}\.preparing-[a-z0-9_]{8}", re.DOTALL)
_ENVIRONMENT = ("PATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "TMPDIR")


@dataclass(frozen=True)
class Quantisation:
    """How a model's matrices are made smaller.

    Attributes:
        bits: 8, rounded row by row, or 4, with error feedback from the calibration.
        group: numbers of a row that share a scale; 0: all of them.
        calibration: JSON lines of texts such as the model is used for; int4 needs them.
        tokens: most of them that errors are fed back for.
        threads: of the processor; the same number gives the same bytes.
        embeddings: bits of embeddings and of the matrix of the logits, 8 or 4; 0: they stay as they are.
    """

    bits: int
    group: int
    calibration: Path | None = None
    tokens: int = 32768
    threads: int = 1
    embeddings: int = 0


@dataclass(frozen=True)
class Preparation:
    """What a model went through before it was bundled.

    Attributes:
        steps: what engine-prepare reported of each step.
        sources: name and SHA-256 of each file that it was made from.
    """

    steps: tuple[Mapping[str, object], ...]
    sources: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Prepared:
    """A folder to build a bundle from, and what was done for it; None where it is the person's own."""

    folder: Path
    preparation: Preparation | None = None


@dataclass(frozen=True)
class Preparer:
    """How to run engine-prepare; only what is installed is imported, never a module of the current directory."""

    command: tuple[str, ...] = (sys.executable, "-P", "-m", "engine.prepare")


@contextmanager
def prepared(
    model: Path,
    out: Path,
    quantisation: Quantisation | None,
    report: Report,
    preparer: Preparer | None = None,
    *,
    keep_embeddings: bool = False,
) -> Iterator[Prepared]:
    """The folder to build from: `model` itself, unless it is a GGUF file or is to be quantised.

    Args:
        model: a folder, or a GGUF file.
        out: the bundle that will be written.
        quantisation: None leaves the numbers as they are.
        report: hears of progress, in bytes of weights.
        preparer: how to run engine-prepare.
        keep_embeddings: those of a GGUF file stay quantised, as its layers do.

    Raises:
        BundleError: PREPARE_FAILED, DISK_FULL, OUT_OF_MEMORY, or engine-prepare's own code; the SOURCE codes.
    """
    is_gguf = model.suffix.lower() == GGUF and model.is_file()
    if not is_gguf and quantisation is None:
        yield Prepared(model)
        return
    check_place(out, directory=False)
    preparer = preparer or Preparer()
    with _place(out) as place:
        digests = tuple(_digests(model, is_gguf, _Hashing(report)))
        steps, folder = [], model
        if is_gguf:
            folder = _step(place / "converted")
            steps.append(_ask(preparer, _conversion(model, folder, quantisation is None, keep_embeddings), report))
        if quantisation is not None:
            source, folder = folder, _step(place / "quantised")
            steps.append(_ask(preparer, _question(quantisation, source, folder), report))
        yield Prepared(folder, Preparation(tuple(steps), digests))


@contextmanager
def _place(out: Path) -> Iterator[Path]:
    """A hidden folder beside the bundle; it is locked while it is used, so what is not locked was left over."""
    beside = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(beside, fcntl.LOCK_EX)  # nobody takes the new folder for one that was left before it is locked
        _remove_left(out.parent)
        place = Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.preparing-", dir=out.parent))
        held = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        _lock(held, fcntl.LOCK_EX)
    finally:
        os.close(beside)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(held)


def _remove_left(folder: Path) -> None:
    """Remove what killed builds of the same person left."""
    for path in folder.iterdir():
        if not _PLACE.fullmatch(path.name):
            continue
        with suppress(OSError):  # another's, no folder, or gone by now
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(fd).st_uid == os.geteuid() and _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


def _lock(fd: int, how: int) -> bool:
    """Whether it is locked now; some network's file systems know no locks, and nothing is removed there."""
    try:
        fcntl.flock(fd, how)
    except OSError:
        return False
    return True


def _step(folder: Path) -> Path:
    folder.mkdir()
    return folder.absolute()


def _conversion(model: Path, folder: Path, keep: bool, embeddings: bool) -> dict[str, object]:
    """Numbers that are quantised stay so, unless they are to be quantised anew; embeddings where that is asked."""
    where = {"source": str(model.absolute()), "out": str(folder)}
    return {"do": "convert", **where, "keep": keep, "embeddings": embeddings}


def _question(quantisation: Quantisation, source: Path, folder: Path) -> dict[str, object]:
    calibration = quantisation.calibration
    return {
        "do": "quantise",
        "source": str(source.absolute()),
        "out": str(folder),
        "bits": quantisation.bits,
        "group": quantisation.group,
        "symmetric": quantisation.bits == 8,
        "calibration": None if calibration is None else str(calibration.absolute()),
        "tokens": quantisation.tokens,
        "threads": quantisation.threads,
        "embeddings": quantisation.embeddings,
    }


class _Hashing:
    """Reports of bytes that are hashed."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._done = 0
        self.total = 0

    def __call__(self, count: int) -> None:
        self._done += count
        self._report(Progress(State.PREPARING, self._done, self.total, file="hashing what it is made from"))


def _digests(model: Path, is_gguf: bool, told: _Hashing) -> Iterator[tuple[str, str]]:
    """Every file that the model is made from."""
    if is_gguf:
        yield model.name, _sha256(model, told)
        return
    with sources.opened(model) as files:
        told.total = sum(files.sizes.values())
        for path in files.sizes:
            yield path, sources.describe(files, path, CHUNK_SIZE, told).sha256


def _sha256(path: Path, told: _Hashing) -> str:
    digest = hashlib.sha256()
    with open(open_file(path), "rb") as stream:
        told.total = os.fstat(stream.fileno()).st_size
        while block := stream.read(_BLOCK):
            digest.update(block)
            told(len(block))
    return digest.hexdigest()


def _ask(preparer: Preparer, question: Mapping[str, object], report: Report) -> Mapping[str, object]:
    """Run engine-prepare on a question; its report.

    Raises:
        BundleError: as `prepared`.
    """
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment |= {"OMP_NUM_THREADS": str(question.get("threads", 1)), "OPENBLAS_NUM_THREADS": "1"}
    try:
        process = subprocess.Popen(
            preparer.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise BundleError("PREPARE_FAILED", f"engine-prepare cannot be started: {error.strerror}") from None
    with process:
        try:
            _limit(process.pid, str(question["do"]))
            answer = _talk(process, question, report)
            status = process.wait()
        finally:
            process.kill()
    if status != 0 or answer is None:
        raise BundleError("PREPARE_FAILED", f"engine-prepare ended with status {status} and without an answer")
    return _read(answer)


def _limit(pid: int, what: str) -> None:
    """Before the question is sent, so nothing hostile is read without them."""
    limits = [(resource.RLIMIT_CORE, 0)]
    limits += [(resource.RLIMIT_AS, _CONVERTING_MEMORY)] if what == "convert" else []
    for which, value in limits:
        try:
            resource.prlimit(pid, which, (value, value))
        except ProcessLookupError:
            return  # it ended by itself; its status tells


def _talk(process: "subprocess.Popen[bytes]", question: Mapping[str, object], report: Report) -> bytes | None:
    """Send the question, pass on progress; the last line, None where there is none."""
    to, answers = _pipes(process)
    try:
        to.write(json.dumps(question).encode())
        to.close()
    except BrokenPipeError:
        return None
    last = None
    while line := answers.readline(_MAX_LINE):
        last = line
        if line.startswith(b'{"stage"'):
            match _object(line):
                case {"stage": str(stage), "done": int(done), "total": int(total)}:
                    report(Progress(State.PREPARING, done, total, file=stage[:40]))
    return last


def _pipes(process: "subprocess.Popen[bytes]") -> tuple[IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None:
        raise BundleError("PREPARE_FAILED", "engine-prepare was started without pipes")
    return process.stdin, process.stdout


def _object(line: bytes) -> Mapping[str, object]:
    try:
        return strict_json.parse_object(line, "a line of engine-prepare", any_number=True)
    except BundleError as error:
        raise BundleError("PREPARE_FAILED", error.message) from None


def _read(answer: bytes) -> Mapping[str, object]:
    match _object(answer):
        case {"ok": True, "report": dict(report)}:
            return report
        case {"ok": False, "code": str(code), "message": str(message)} if _CODE.fullmatch(code):
            raise BundleError(code, message[:_MAX_MESSAGE])
    raise BundleError("PREPARE_FAILED", "engine-prepare answered in an unknown form")
