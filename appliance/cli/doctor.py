"""`cloister doctor`: looks at this machine and a home directory; each finding says what to do about it."""

import argparse
import os
import platform
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from appliance.cli import liveness
from appliance.cli.failure import FAILED
from appliance.cli.finding import Finding
from appliance.cli.output import emit, printable, size
from appliance.cli.serve import socket_room
from appliance.errors import CloisterError

_GIB = 1 << 30
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TORCH = "import torch; print(torch.__version__, torch.cuda.is_available(), torch.get_num_threads())"


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister doctor`."""
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    home = args.home.resolve()
    findings = [check(home) for check in CHECKS]
    emit(args, [asdict(finding) for finding in findings], "\n".join(_shown(f) for f in findings))
    return FAILED if any(f.level == "FAIL" for f in findings) else 0


def _shown(finding: Finding) -> str:
    line = f"{finding.level:<5} {finding.check:<10} {printable(finding.found)}"
    return f"{line}\n{'':17}{printable(finding.remedy)}" if finding.remedy else line


def _python(_: Path) -> Finding:
    return Finding("python", "OK", f"{platform.python_version()}, {sys.executable}")


def _torch(_: Path) -> Finding:
    """In a process of its own: a torch that crashes on this CPU must not take the doctor along."""
    try:
        command = [sys.executable, "-P", "-c", _TORCH]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return Finding(
            "torch", "FAIL", "does not load within 120 s", "look at the disk and memory of this machine"
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Finding(
            "torch", "FAIL", last, "install the server extra: ./install.sh --demo, or pip install '.[server]'"
        )
    version, cuda, threads = done.stdout.split()
    return Finding(
        "torch", "OK", f"{version}, CUDA {'usable' if cuda == 'True' else 'not usable'}, {threads} threads"
    )


def _kernels(_: Path) -> Finding:
    """Whether a worker would compute with the native library, and why not; in a process of its own, as torch."""
    try:
        command = [sys.executable, "-P", "-m", "kernels.native"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return Finding(
            "kernels", "FAIL", "do not load within 120 s", "look at the disk and memory of this machine"
        )
    found = (done.stdout or done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
    if done.returncode != 0:
        return Finding("kernels", "FAIL", found[-1], "workers would not start: mend it, or install again")
    if not found[-1].startswith("native "):
        remedy = "models run on torch alone, slower: run ./install.sh where there is GCC 11 or newer"
        return Finding("kernels", "WARN", found[-1], remedy)
    return Finding("kernels", "OK", found[-1])


def _huge_pages(_: Path) -> Finding:
    """Whether weights can lie in them; Documentation/admin-guide/mm/transhuge.rst."""
    try:
        chosen = re.findall(r"\[(\w+)\]", _HUGE_PAGES.read_text())[0]
    except (OSError, IndexError):
        return Finding("huge pages", "WARN", "this kernel has none", "models run, some percent slower")
    if chosen == "never":
        remedy = f"weights are read some percent slower: echo madvise > {_HUGE_PAGES}, as root"
        return Finding("huge pages", "WARN", "switched off", remedy)
    return Finding("huge pages", "OK", f"{chosen}: weights lie in them")


def _cpu(_: Path) -> Finding:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return Finding("cpu", "WARN", f"{platform.machine()}, flags unknown", "only Linux is measured and tested")
    flags = set(re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.M)[0].split()) if text else set()
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_tile", "sha_ni", "asimd", "sha2") if f in flags]
    found = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {' '.join(known) or 'no vector flags'}"
    if not {"avx2", "asimd"} & flags:
        return Finding("cpu", "WARN", found, "without AVX2 models run, slowly; choose a newer machine")
    return Finding("cpu", "OK", found)


def _memory(_: Path) -> Finding:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = f"{size(free)} free of {size(total)}"
    if total < 2 * _GIB:
        return Finding("memory", "WARN", found, "2 GiB is the least that the processes and a small model need")
    return Finding("memory", "OK", found)


def _sqlite(_: Path) -> Finding:
    """STRICT tables came with 3.37."""
    version = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < (3, 37):
        return Finding("sqlite", "FAIL", version, "use a Python built with SQLite 3.37 or newer")
    return Finding("sqlite", "OK", version)


def _disk(home: Path) -> Finding:
    place = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(place).free
    found = f"{size(free)} free where {place} lies"
    if free < _GIB:
        return Finding(
            "disk", "FAIL", found, "free some space: imports and the audit log stop when the disk is full"
        )
    if free < 10 * _GIB:
        return Finding("disk", "WARN", found, "models are large; choose a home on a larger disk")
    return Finding("disk", "OK", found)


def _home(home: Path) -> Finding:
    if not home.exists():
        return Finding("home", "WARN", f"{home} does not exist", "make it with `cloister init`")
    if not (home / "control").is_dir():
        return Finding("home", "WARN", f"{home} is not initialised", "run `cloister init`")
    for path in (home, *(home / name for name in ("run", "control", "gateway", "trust", "store"))):
        if not path.exists():
            continue
        facts = path.stat()
        if facts.st_uid != os.getuid():
            return Finding("home", "FAIL", f"{path} belongs to user {facts.st_uid}", "run as the user who made it")
        mode = stat.S_IMODE(facts.st_mode)
        if mode & 0o077:
            return Finding(
                "home", "FAIL", f"{path} has mode {mode:04o}", f"others can enter it: chmod 0700 {path}"
            )
    return Finding("home", "OK", str(home))


def _settings(home: Path) -> Finding:
    from appliance import settings_file

    try:
        found = [
            entry for entry in settings_file.load(home / settings_file.FILE).entries() if entry.source == "file"
        ]
    except CloisterError as error:
        return Finding(
            "settings", "FAIL", " ".join(error.message.split()), "mend it; `cloister serve` would not start"
        )
    return Finding("settings", "OK", f"{len(found)} set in {settings_file.FILE}, the others have their defaults")


def _sockets(home: Path) -> Finding:
    room = socket_room(home)
    if room < 0:
        remedy = f"choose a home whose path is {-room} bytes shorter"
        return Finding("sockets", "FAIL", f"paths in {home / 'run'} exceed the kernel's 107 bytes", remedy)
    return Finding("sockets", "OK", f"{room} bytes of path to spare")


CHECKS: tuple[Callable[[Path], Finding], ...] = (
    _python,
    _torch,
    _kernels,
    _cpu,
    _huge_pages,
    _memory,
    _sqlite,
    _disk,
    _home,
    _settings,
    _sockets,
    liveness.check,
)
