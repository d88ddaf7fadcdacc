"""How a process of one deployment starts: where things are in argv, the Deployment on stdin, files by digest.

engine-host writes one serialised `cloister.engine.v1.Deployment` to the process's standard input and closes it. A
deployment that cannot run as asked ends its process with status `REFUSED_STATUS` after one JSON object
{"code", "message"} as the last line of standard output; any other end is a crash, and engine-host tries again.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from google.protobuf.message import DecodeError

from engine.derived.location import Derived, Location
from engine.errors import EngineError
from engine.process import die_with_parent
from engine.protos import engine_pb2
from engine.weights.files import File, FileSet

REFUSED_STATUS = 3
"""Exit status of a process whose deployment cannot run; starting it again would not help."""

STEP_WITHIN_VARIABLE = "CLOISTER_STEP_WITHIN_S"
"""Names the seconds that one turn of a worker's engine may take before the worker gives no more signs of life."""

CORES_VARIABLE = "CLOISTER_CORES"
"""Names the hardware threads, with commas, that a worker's threads have to themselves, one for each, if any."""

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
"""CUDA's own: the ids of the devices that a process sees. A worker sees the one it computes on, by its UUID, and
every other process none (NVIDIA, "CUDA C++ Programming Guide", CUDA environment variables)."""

DERIVED_REFUSED = "DERIVED_REFUSED"
"""The fact by which a worker tells why it did not use the derived file it was given."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Launch:
    """What one process of one deployment was started with."""

    deployment: engine_pb2.Deployment
    store: Path
    socket: Path
    derived_folder: Path | None = None

    @property
    def files(self) -> FileSet:
        """The exact files of the model version."""
        given = self.deployment.files
        return FileSet(given.model_digest, tuple(File(f.path, f.size, f.sha256) for f in given.files))

    def open_file(self, sha256: str) -> int:
        """As `open_in_store`, in the store of this launch."""
        return open_in_store(self.store, sha256)

    @property
    def derived(self) -> Location | None:
        """The model's derived file, if engine-host has one for this deployment."""
        if self.derived_folder is None or not self.deployment.HasField("derived"):
            return None
        return Location(self.derived_folder, derived_of(self.deployment.derived))


def derived_of(message: engine_pb2.Derived) -> Derived:
    """A derived file as the protocol has it, in the engine's own words."""
    return Derived(message.model_digest, message.layout, message.sha256, message.size)


def open_in_store(store: Path, sha256: str) -> int:
    """A read-only descriptor of the store's file with this digest; the caller closes it and checks the bytes.

    Raises:
        EngineError: INVALID_DEPLOYMENT, not a digest; FILE_MISSING, the store has no such file.
    """
    if not _SHA256.fullmatch(sha256):
        raise EngineError("INVALID_DEPLOYMENT", "a file's digest is not 64 lower-case hexadecimal digits")
    path = store / "sha256" / sha256[:2] / sha256
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise EngineError(
            "FILE_MISSING", f"{path} cannot be opened ({error.strerror}); import the bundle again"
        ) from error


def read_launch(program: str, argv: Sequence[str] | None = None) -> Launch:
    """The launch as the command line and standard input have it; standard input is let go.

    From here on the process dies with its parent; one whose parent died before ends here, ahead of its socket.

    Raises:
        EngineError: INVALID_DEPLOYMENT, standard input holds no complete Deployment.
    """
    parser = argparse.ArgumentParser(
        prog=program, description="Reads one cloister.engine.v1.Deployment from standard input."
    )
    parser.add_argument("--store", type=Path, required=True, help="the content-addressed store")
    parser.add_argument("--derived", type=Path, help="the folder of packed weights")
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket to listen on")
    parser.add_argument("--parent", type=int, help="process id of engine-host; nothing runs without it")
    chosen = parser.parse_args(argv)
    die_with_parent()
    if chosen.parent is not None and os.getppid() != chosen.parent:
        sys.exit(f"{program}: process {chosen.parent}, which started this one, is gone")
    raw = sys.stdin.buffer.read()
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    try:
        deployment = engine_pb2.Deployment.FromString(raw)
    except DecodeError as error:
        raise EngineError("INVALID_DEPLOYMENT", f"{len(raw)} bytes on stdin are no Deployment") from error
    if not deployment.name or not deployment.files.files:
        raise EngineError("INVALID_DEPLOYMENT", "the Deployment on stdin lacks its name or its files")
    return Launch(deployment, chosen.store, chosen.socket, chosen.derived)


def given_cores() -> tuple[int, ...]:
    """The hardware threads that this worker's threads have to themselves, in order; none where nobody says."""
    return tuple(int(number) for number in os.environ.get(CORES_VARIABLE, "").split(",") if number)


def keep_to(cores: tuple[int, ...]) -> None:
    """Run this thread, and those it starts, on these hardware threads; before torch comes and counts them."""
    if cores:
        with contextlib.suppress(OSError):  # not this machine's any more
            os.sched_setaffinity(0, cores)


def exit_refused(error: EngineError) -> NoReturn:
    """End this process at once, telling engine-host why its deployment cannot run."""
    sys.stdout.write(json.dumps({"code": error.code, "message": error.message}) + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(REFUSED_STATUS)
