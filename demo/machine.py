"""The appliance of one demo: where it lives, its commands, and proof that nothing of it is left running."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from appliance.cli.serve import socket_room
from engine.process import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
CLOISTER = Path(sys.executable).with_name("cloister")
START_LIMIT_S = 90.0
STOP_LIMIT_S = 90.0
# Where a demo lives whose checkout has too long a path, and the file in the checkout that says so.
_TEMPORARY, _PREFIX, _WHERE = Path("/tmp"), "cl-demo-", "where"  # noqa: S108  # made by mkdtemp, for this user alone


class CommandError(Exception):
    """A command did not end as it should have."""

    code = "DEMO_STEP_FAILED"


class Machine:
    """A fresh home directory and everything beside it, in `folder`.

    Args:
        name: of the folder in the checkout; what an earlier run left there is stopped and removed.

    Attributes:
        folder: `name` in the checkout, or a temporary folder where the checkout's path is too long for sockets.
        home: the appliance's home directory.
        elsewhere: `folder` is not in the checkout.
    """

    def __init__(self, name: str = ".demo") -> None:
        self.folder = beside = ROOT / name
        self.elsewhere = socket_room(beside / "home") < 0
        for earlier in (*_recorded(beside), beside):
            _stop_earlier(earlier / "home")
            shutil.rmtree(earlier, ignore_errors=True)
        beside.mkdir(mode=0o700)
        if self.elsewhere:
            self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_TEMPORARY))
            (beside / _WHERE).write_text(str(self.folder))
        self.home = self.folder / "home"
        self._server: subprocess.Popen[bytes] | None = None

    def shown(self, path: Path) -> str:
        """A path as one would type it in the checkout."""
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)

    def run(self, words: Sequence[str], expect: int = 0, live: bool = False) -> subprocess.CompletedProcess[str]:
        """Run `cloister WORDS`; with `live` its progress goes to the terminal.

        Raises:
            CommandError: its exit status is not `expect`.
        """
        stderr = None if live else subprocess.PIPE
        done = subprocess.run(
            [str(CLOISTER), *words],
            cwd=ROOT,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            check=False,
        )
        if done.returncode != expect:
            said = "\n".join(text.strip() for text in (done.stdout, done.stderr) if text)
            raise CommandError(f"cloister {' '.join(words)}: exit status {done.returncode}, not {expect}\n{said}")
        return done

    def serve(self, words: Sequence[str], keep: bool) -> list[str]:
        """Start `cloister serve` and wait until it is ready; the lines it printed.

        Raises:
            CommandError: it ended, or did not become ready in time.
        """
        log = self.folder / "serve.log"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, log.open("wb") as out:
            address = self.folder / "notify.sock"
            notify.bind(str(address))
            self._server = subprocess.Popen(
                [str(CLOISTER), *words],
                cwd=ROOT,
                env={**self._environment(), "NOTIFY_SOCKET": str(address)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=None if keep else partial(die_with_parent, signal.SIGTERM),  # noqa: PLW1509  # no threads yet
            )
            notify.settimeout(0.2)
            deadline = time.monotonic() + START_LIMIT_S
            while not _received(notify):
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise CommandError(f"cloister serve is not ready:\n{log.read_text(errors='replace').strip()}")
        return log.read_text(errors="replace").splitlines()

    @property
    def server_pid(self) -> int:
        """Process id of `cloister serve`; 0 when it does not run."""
        return self._server.pid if self._server is not None else 0

    def stop(self) -> int:
        """SIGTERM to `cloister serve`; its exit status once it has ended, killed if it must be."""
        if self._server is None:
            return 0
        self._server.send_signal(signal.SIGTERM)
        try:
            return self._server.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            return self._server.wait()
        finally:
            self._server = None

    def processes(self) -> dict[int, str]:
        """Every process whose command line names this home directory: process id -> what it runs."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                words = _command_line(entry)
                if any(str(self.home) in word for word in words):
                    found[int(entry.name)] = _module(words)
        return found

    def tidy(self) -> None:
        """Remove a folder that is not in the checkout. What is left by other ways, the next demo removes."""
        if self.elsewhere:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CLOISTER_HOME": str(self.home)}


def _recorded(beside: Path) -> Iterator[Path]:
    """Where an earlier demo of this checkout lived, if not in it; only a folder that a demo can have made."""
    with contextlib.suppress(OSError):
        earlier = Path((beside / _WHERE).read_text())
        facts = earlier.lstat()
        ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
        if ours and earlier.parent == _TEMPORARY and earlier.name.startswith(_PREFIX):
            yield earlier


def _received(notify: socket.socket) -> bool:
    try:
        return b"READY=1" in notify.recv(4096)
    except TimeoutError:
        return False


def _command_line(entry: Path) -> list[str]:
    """The words of a process's command; none when it has just ended."""
    try:
        return (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _module(words: Sequence[str]) -> str:
    """What follows -m, or the program."""
    return words[words.index("-m") + 1] if "-m" in words else Path(words[0]).name


def _stop_earlier(home: Path) -> None:
    """Stop a demo that was kept: the one whose supervisor holds this home's lock."""
    lock = home / "run" / "serve.lock"
    if not lock.exists():
        return
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = int(file.read())
            print(f"Stopping the demo that was kept (process {pid}).\n", flush=True)
            os.kill(pid, signal.SIGTERM)
            fcntl.flock(file, fcntl.LOCK_EX)
