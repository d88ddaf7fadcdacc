"""A real appliance for a test: its own home, its own keys, every process as `cloister serve` starts them."""

import contextlib
import io
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from appliance.cli.main import main
from appliance.client import AsyncClient, Client
from engine.protos.engine_pb2 import GetStatusRequest, GetStatusResponse
from engine.protos.engine_pb2_grpc import WorkerServiceStub

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "demo" / "demo-notes-s"
CLOISTER = Path(sys.executable).with_name("cloister")
ALIAS = "notes"
START_LIMIT_S = 60
_ONE_SPEAKS = threading.Lock()  # standard output is the process's, not the thread's
MODULES = {
    "control": "appliance.control",
    "importer": "bundles.importer",
    "engine-host": "engine.host",
    "gateway": "appliance.gateway",
    "worker": "engine.worker",
    "text": "engine.text",
}


@dataclass(frozen=True)
class Appliance:
    """Where a running appliance lives, and how to talk to it as an operator and as a tenant."""

    home: Path
    keys: Path
    credentials: Path
    bundle: Path
    supervisor: subprocess.Popen[bytes]

    def cloister(self, *argv: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        """Run one `cloister` command on this home; its exit status must be `expect`."""
        return cloister("--home", str(self.home), *argv, expect=expect)

    def json(self, *argv: str) -> Any:
        """What a command prints with --json."""
        return json.loads(said("--home", str(self.home), "--json", *argv))

    def records(self) -> list[Any]:
        """The newest records of the audit log."""
        lines = said("--home", str(self.home), "--json", "audit", "tail", "-n", "1000").splitlines()
        return [json.loads(line) for line in lines]

    def status(self) -> Any:
        """`cloister status --json`."""
        return self.json("status")

    def deployment(self, name: str = ALIAS) -> Any:
        """One deployment as `cloister status` shows it."""
        return next(d for d in self.status()["deployments"] if d["name"] == name)

    def owned_pages(self) -> int:
        """KV pages that requests own at present, as the worker itself counts them."""
        counters = self.counters()
        return counters.blocks_total - counters.blocks_free - counters.blocks_cached

    def counters(self, deployment: str = ALIAS) -> GetStatusResponse:
        """What a worker says of itself."""
        with grpc.insecure_channel(f"unix:{self.home}/run/worker-{deployment}.sock") as channel:
            return WorkerServiceStub(channel).GetStatus(GetStatusRequest(), timeout=10)

    def pid_of(self, process: str, deployment: str = ALIAS) -> int:
        """The process id of one process of this home, or of one deployment, found by what it was started as."""
        module = MODULES[process]
        place = f"run/{process}-{deployment}.sock" if process in ("worker", "text") else ""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    argv = (entry / "cmdline").read_bytes().decode().split("\0")
                except OSError:
                    continue
                if module in argv and any(f"{self.home}/{place}" in f"{argument}/" for argument in argv):
                    return int(entry.name)
        raise AssertionError(f"{process} is not running")

    def client(self) -> Client:
        """A tenant's client, over mutual TLS."""
        return Client.from_dir(self.credentials)

    def async_client(self) -> AsyncClient:
        """The same, for many streams at once."""
        return AsyncClient.from_dir(self.credentials)

    def logs(self) -> str:
        """Everything the processes logged."""
        return "".join(path.read_text(errors="replace") for path in sorted((self.home / "logs").iterdir()))


def cloister(*argv: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the console script; its exit status must be `expect`."""
    done = subprocess.run([str(CLOISTER), *argv], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expect, f"{argv} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def said(*argv: str) -> str:
    """What a command prints, from its own code in this process: tests ask again and again, and a Python for each
    question costs a quarter of a second. It must succeed.
    """
    with _ONE_SPEAKS, io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as out, io.StringIO() as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(argv)
        out.seek(0)
        printed = out.read()
        assert status == 0, f"{argv} -> {status}\n{printed}\n{err.getvalue()}"
        return printed


def build_bundle(folder: Path, model: Path = DEMO_MODEL, sequence: int = 1, name: str = "demo-notes-s") -> Path:
    """Make keys in `folder` (once) and a signed bundle of `model` beside them."""
    keys = folder / "keys"
    if not keys.exists():
        cloister("trust", "init", "--out", str(keys))
    bundle = folder / f"{name}-{sequence}.bundle"
    version = f"1.0.{sequence}"
    cloister("bundle", "build", "--model", str(model), "--name", name, "--version", version,
             "--sequence", str(sequence), "--out", str(bundle))  # fmt: skip
    cloister("bundle", "sign", str(bundle), "--release-key", str(keys / "release.key"),
             "--publisher-key", str(keys / "publisher.key"), "--root", str(keys / "root.json"))  # fmt: skip
    return bundle


def flip_bit(path: Path, offset: int) -> None:
    """Change one bit of a file; the same again changes it back."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def other_weights(folder: Path) -> Path:
    """The demo model with one bit of its weights changed, so that no store has the file; its folder."""
    model = folder / "other-weights"
    if not model.exists():
        shutil.copytree(DEMO_MODEL, model)
        weights = model / "model.safetensors"
        flip_bit(weights, weights.stat().st_size - 2)  # the lowest of the last number
    return model


def initialise(home: Path, keys: Path) -> None:
    """`cloister init` with the present user as the operator."""
    user = os.environ.get("USER") or _user_name()
    cloister("--home", str(home), "init", "--operator", f"alice={user}", "--site", "test", "--profile", "demo",
             "--root", str(keys / "root.json"))  # fmt: skip


def _user_name() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


@contextmanager
def serving(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`cloister serve` on an ephemeral port, from READY to a clean exit on SIGTERM."""
    with (
        tempfile.TemporaryDirectory(prefix="cl-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        notify = f"{folder}/notify"
        sock.bind(notify)
        sock.settimeout(START_LIMIT_S)
        process = subprocess.Popen(
            [str(CLOISTER), "--home", str(home), "serve", "--listen", "127.0.0.1:0"],
            env={**os.environ, "NOTIFY_SOCKET": notify},
            stdout=subprocess.DEVNULL,
        )
        try:
            while b"READY=1" not in sock.recv(4096):
                assert process.poll() is None, "serve ended before it was ready"
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0, "serve did not drain and exit 0"


@contextmanager
def running_appliance(*load_options: str) -> Iterator[Appliance]:
    """An appliance with the demo model loaded as ALIAS and one tenant that may call it."""
    folder = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    try:
        bundle = build_bundle(folder)
        home = folder / "home"
        initialise(home, folder / "keys")
        with serving(home) as process:
            appliance = Appliance(home, folder / "keys", folder / "credentials", bundle, process)
            appliance.cloister("bundle", "import", str(bundle))
            appliance.cloister("model", "load", "demo-notes-s", "--as", ALIAS, *load_options)
            appliance.cloister("alias", "set", ALIAS, ALIAS)
            appliance.cloister("tenant", "add", "ward-notes", "--models", ALIAS, "--max-concurrent", "64")
            issue_key(appliance, "ward-notes", appliance.credentials)
            yield appliance
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def eventually(condition: Callable[[], bool], what: str, limit_s: float = 45) -> None:
    """Wait until `condition` holds; `what` names it when it does not."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.1)


def issue_key(appliance: Appliance, tenant: str, out: Path) -> None:
    """A certificate, a key and an API key for an application of `tenant`."""
    appliance.cloister("key", "issue", "--tenant", tenant, "--app", "summary", "--out", str(out))
