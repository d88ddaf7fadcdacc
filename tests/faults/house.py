"""What the fault tests share: a whole appliance that may be hurt, streams under way in it, what must be left."""

import asyncio
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from appliance.client import AsyncClient, CloisterError
from engine.protos.engine_pb2 import GetStatusRequest, GetStatusResponse
from engine.protos.engine_pb2_grpc import WorkerServiceStub
from tests import mercy
from tests.e2e.appliance import (
    ALIAS,
    MODULES,
    ROOT,
    START_LIMIT_S,
    Appliance,
    build_bundle,
    eventually,
    initialise,
    issue_key,
)

LIMIT_S = 90.0
TENANT = "ward-notes"
_numbers = itertools.count()


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a path short enough for sockets, removed in the end."""
    path = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Server:
    """`cloister serve` on one home and one port, over all its lives."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._victims = home / "victims"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.process: subprocess.Popen[bytes]

    def start(self) -> subprocess.Popen[bytes]:
        """From nothing to READY; its watchdogs do not take long, with a process that a test has stopped."""
        with short_folder() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(f"{folder}/notify")
            notify.settimeout(0.5)
            with (self._home / "serve.out").open("ab") as told:
                self.process = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "tests.faults.impatient",
                        "--home",
                        self._home,
                        "--json",
                        "serve",
                        "--listen",
                        self.address,
                    ],
                    cwd=ROOT,
                    env={**os.environ, **mercy.environment(self._victims), "NOTIFY_SOCKET": f"{folder}/notify"},
                    stdout=told,
                )
            eventually(lambda: self._is_ready(notify), "serve is ready", START_LIMIT_S)
        return self.process

    def _is_ready(self, notify: socket.socket) -> bool:
        assert self.process.poll() is None, f"serve ended before it was ready: {self.told()}"
        try:
            return b"READY=1" in notify.recv(4096)
        except TimeoutError:
            return False

    def told(self) -> str:
        """The lines it has printed."""
        return (self._home / "serve.out").read_text()

    @contextmanager
    def stopped(self, pid: int) -> Iterator[None]:
        """A process of this home stands still in here, unless a watchdog ends it; it goes on afterwards."""
        mercy.give_up(self._victims, pid)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and what it started ends with it."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM; it must drain and exit 0."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=60) == 0, "serve did not drain and exit 0"


@dataclass(frozen=True)
class Ended:
    """How a client's stream ended: with a status and a code, and after how many tokens."""

    status: grpc.StatusCode
    code: str
    tokens: int


@dataclass(frozen=True)
class House:
    """An appliance that a test may hurt."""

    appliance: Appliance
    server: Server

    def client(self) -> AsyncClient:
        """A tenant's client; nothing is sent again by itself unless a request says so."""
        return AsyncClient.from_dir(self.appliance.credentials)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """After what happens in here the appliance answers, and holds nothing of what was."""
        yield
        self.settled()

    def settled(self) -> None:
        """Wait until a tenant is answered; then no lease, token, page or open intent may be left."""
        eventually(self.answers, "an answer", LIMIT_S)
        eventually(lambda: self.status()["open_leases"] == 0, "every lease is closed", LIMIT_S)
        eventually(lambda: self.owned() == 0, "every page is free", LIMIT_S)
        assert self.status()["reserved_tokens"] == 0
        verdict = self.appliance.json("audit", "verify")
        assert (verdict["intact"], verdict["open_intents"]) == (True, 0)

    def status(self) -> Any:
        """`cloister status --json`."""
        return self.appliance.status()

    def worker(self, deployment: str = ALIAS) -> GetStatusResponse:
        """The worker's own counters."""
        with grpc.insecure_channel(f"unix:{self.appliance.home}/run/worker-{deployment}.sock") as channel:
            return WorkerServiceStub(channel).GetStatus(GetStatusRequest(), timeout=10)

    def owned(self, deployment: str = ALIAS) -> int:
        """KV pages that requests own."""
        counters = self.worker(deployment)
        return counters.blocks_total - counters.blocks_free - counters.blocks_cached

    def answers(self, deployment: str = ALIAS) -> bool:
        """A tenant gets an answer now."""
        try:
            with self.appliance.client() as client:
                return bool(list(client.generate(deployment, text="hello", max_tokens=2, retry=False)))
        except (CloisterError, AssertionError):
            return False

    def processes(self) -> dict[str, int]:
        """The process ids of all that runs in this home."""
        return {name: self.appliance.pid_of(name) for name in MODULES} | {"serve": self.server.process.pid}


@contextmanager
def open_house(settings: str = "", prepare: Callable[[Path], None] | None = None) -> Iterator[House]:
    """An appliance from `init` to a clean end, with these settings, the demo model and one tenant.

    `prepare` gets the home before anything is served from it.
    """
    with short_folder() as folder:
        bundle, home = build_bundle(folder), folder / "home"
        initialise(home, folder / "keys")
        (home / "cloister.toml").write_text(settings)
        if prepare is not None:
            prepare(home)
        server = Server(home)
        appliance = Appliance(home, folder / "keys", folder / "credentials", bundle, server.start())
        try:
            appliance.cloister("bundle", "import", str(bundle))
            load(appliance, ALIAS)
            appliance.cloister("tenant", "add", TENANT, "--models", ALIAS, "--max-concurrent", "1024")
            issue_key(appliance, TENANT, appliance.credentials)
            yield House(appliance, server)
            server.stop()
        finally:
            server.kill()


def load(appliance: Appliance, name: str, *options: str) -> None:
    """A deployment of the demo model and an alias of the same name."""
    appliance.cloister("model", "load", "demo-notes-s", "--as", name, *options)
    appliance.cloister("alias", "set", name, name)


class Running:
    """One answer under way, to its end, whatever that is; never sent again by itself."""

    def __init__(self, client: AsyncClient, model: str = ALIAS, prompt: str = "", **options: Any) -> None:
        options = {"ignore_eos": True, "retry": False, "return_token_ids": True} | options
        prompt = prompt or f"hello {next(_numbers)}"  # what was there at two deaths of the engine is a suspect
        self._stream = client.generate(model, text=prompt, **options)
        self._begun = asyncio.Event()
        self.end = asyncio.create_task(self._read())

    async def begun(self) -> None:
        """Wait for the first token.

        Raises:
            AssertionError: it ended without one.
        """
        waiting = asyncio.create_task(self._begun.wait())
        await asyncio.wait((waiting, self.end), timeout=LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        assert self._begun.is_set(), self.end

    def cancel(self) -> None:
        """Go away."""
        self._stream.cancel()

    async def _read(self) -> Ended:
        try:
            async for _ in self._stream:
                self._begun.set()
        except CloisterError as error:
            return Ended(error.status, error.code, len(self._stream.token_ids))
        return Ended(grpc.StatusCode.OK, "", len(self._stream.token_ids))


async def under_way(client: AsyncClient, count: int, **options: Any) -> list[Running]:
    """So many long answers, each with its first token."""
    streams = [Running(client, **({"max_tokens": 900, "temperature": 0.0} | options)) for _ in range(count)]
    for stream in streams:
        await stream.begun()
    return streams


async def ends(streams: list[Running]) -> list[Ended]:
    """How each of them ended."""
    return await asyncio.gather(*(stream.end for stream in streams))


def gone(pid: int) -> bool:
    """No such process, or one that has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
