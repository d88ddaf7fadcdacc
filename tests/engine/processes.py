"""The engine's processes as they are really started: Deployment on stdin, READY over a notify socket."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

READY_LIMIT_S = 60.0


@dataclass
class Running:
    """A process that has said READY."""

    process: asyncio.subprocess.Process
    said: list[str]

    async def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), READY_LIMIT_S)


async def spawn(
    run: Path, argv: Sequence[str], stdin: bytes, modules: Path | None = None
) -> tuple[asyncio.subprocess.Process, socket.socket]:
    """Start `python -m argv...` with a notify socket in `run`; it finds further modules in `modules`."""
    path = run / f"up-{len(list(run.iterdir()))}"
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    notify.bind(str(path))
    found = [*([str(modules)] if modules else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *argv),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "NOTIFY_SOCKET": str(path), "PYTHONPATH": os.pathsep.join(found)},
    )
    assert process.stdin is not None
    process.stdin.write(stdin)
    await process.stdin.drain()
    process.stdin.close()
    return process, notify


@contextlib.asynccontextmanager
async def running(
    run: Path, argv: Sequence[str], stdin: bytes = b"", modules: Path | None = None
) -> AsyncIterator[Running]:
    """A process from READY on; killed at the end if it still runs."""
    process, notify = await spawn(run, argv, stdin, modules)
    try:
        reading = asyncio.get_running_loop().sock_recv(notify, 4096)
        said = await asyncio.wait_for(reading, READY_LIMIT_S)
        yield Running(process, said.decode().split("\n"))
    finally:
        notify.close()
        if process.returncode is None:
            process.kill()
            await process.wait()


async def refusal(run: Path, argv: Sequence[str], stdin: bytes) -> tuple[int, str]:
    """Run a process to its end; its exit status and the last line it wrote."""
    process, notify = await spawn(run, argv, stdin)
    assert process.stdout is not None
    with notify:  # a process whose parent no longer listens does not start
        output = await asyncio.wait_for(process.stdout.read(), READY_LIMIT_S)
    return await process.wait(), output.decode().strip().rpartition("\n")[2]
