"""`python -m appliance.control.init`: a new home directory, once: keys, authority, databases, the first operator.

Everything is made in a folder `.initialising` inside the home and moved into place at the end, `control/` last. So
a home either has a `control/` and is complete, or an interrupted init can simply be run again.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from appliance import settings_file
from appliance.control import records
from appliance.control.audit import AuditLog, Record, make_key
from appliance.control.db.database import Database
from appliance.control.db.models import Meta, Operator
from appliance.control.home import Home
from appliance.control.identity.authority import Authority
from appliance.control.identity.secret_keys import SecretKeys, write_secret
from appliance.control.names import check_name
from appliance.errors import CloisterError
from appliance.policy import Role

_FOLDERS = ("run", "gateway", "trust", "store", "logs", "control")
"""In the order in which they are moved into place."""
_BUILD = ".initialising"
_SYSTEM_HOMES = tuple(map(Path, ("/var/lib", "/srv", "/opt", "/usr", "/etc")))
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_LONGEST_SITE = 48
_MOST_ROOT_BYTES = 1 << 20
_EXIT = {grpc.StatusCode.INVALID_ARGUMENT: 2}
_REFUSED = 3


@dataclass(frozen=True)
class Plan:
    """What `init` was asked to make.

    Attributes:
        home: the directory.
        operator: the first operator's name.
        uid: who that is to the operating system.
        site: trust domain of every certificate.
        profile: site or demo; sealed in the genesis record.
        listen_names: host names and addresses of the gateway besides the local ones.
        root: the root of trust for bundles, as read; None for none.
    """

    home: Path
    operator: str
    uid: int
    site: str
    profile: str
    listen_names: tuple[str, ...] = ()
    root: bytes | None = None


def initialise(plan: Plan) -> dict[str, str]:
    """Make the home; what the operator should know of it, none of it secret.

    Raises:
        CloisterError: ALREADY_INITIALISED, RUNNING, INIT_RUNNING, HOME_NOT_EMPTY, or a refused operator.
    """
    _check_operator(plan)
    plan.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(plan.home):
        _check_free(plan.home)
        build = plan.home / _BUILD
        shutil.rmtree(build, ignore_errors=True)
        for name in _FOLDERS:
            (build / name).mkdir(mode=0o700, parents=True)
        facts = _fill(Home(build), plan)
        for name in _FOLDERS:
            _move(build / name, plan.home / name)
        build.rmdir()
        _write_example(plan.home / settings_file.FILE)
        _sync(plan.home)
    return facts


def _write_example(path: Path) -> None:
    """The settings file, all commented out; one that is there was put there to be used."""
    with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
        file.write(settings_file.example())


def _fill(home: Home, plan: Plan) -> dict[str, str]:
    """Make everything that a home holds on its first day."""
    home.keys.mkdir(mode=0o700)
    home.ca.mkdir(mode=0o700)
    SecretKeys.create(home.keys)
    make_key(home.audit_key, audit_origin(plan.site))
    authority = Authority.create(home.ca, plan.site)
    _fill_gateway(home.root / "gateway", authority, plan.listen_names)
    if plan.root is not None:
        write_secret(home.root / "trust" / "1.root.json", plan.root)
    write_secret(home.root / "trust" / "site", plan.site.encode() + b"\n")
    _fill_database(home, plan)
    facts = {
        "site": plan.site,
        "profile": plan.profile,
        "operator": plan.operator,
        "ca_sha256": authority.fingerprint.hex(),
        "trust_root_sha256": hashlib.sha256(plan.root).hexdigest() if plan.root is not None else "",
    }
    facts["audit_verifier_key"] = _fill_audit(home, plan, facts)
    return {"home": str(plan.home), **facts}


def _fill_gateway(folder: Path, authority: Authority, listen_names: tuple[str, ...]) -> None:
    server = authority.issue_server((*_LOCAL_NAMES, socket.gethostname(), *listen_names))
    write_secret(folder / "tls.pem", server.certificate_pem)
    write_secret(folder / "tls.key", server.key_pem)
    write_secret(folder / "client-ca.pem", authority.certificate_pem)


def _fill_database(home: Home, plan: Plan) -> None:
    home.database.touch(mode=0o600)
    database = Database(home.database)
    roles = ",".join(sorted(Role))
    rows = (
        Meta(name="site", value=plan.site),
        Meta(name="profile", value=plan.profile),
        Operator(name=plan.operator, uid=plan.uid, roles=roles, created_ns=time.time_ns()),
    )
    try:
        database.submit(lambda session: session.add_all(rows)).result()
    finally:
        database.close()


def _fill_audit(home: Home, plan: Plan, facts: dict[str, str]) -> str:
    log = AuditLog.create(home.audit_database, home.audit_head, home.audit_key, audit_origin(plan.site))
    try:
        roles = sorted(Role)
        genesis = Record(
            "appliance.genesis",
            "event",
            records.CONTROL,
            "sealed",
            facts={**facts, "uid": plan.uid, "roles": roles},
        )
        log.append(genesis).result()
        return log.verifier_key
    finally:
        log.close()


def audit_origin(site: str) -> str:
    """Name of a site's audit log."""
    return f"cloister/{site}/audit"


def _check_operator(plan: Plan) -> None:
    """In a private home the one who makes it is the first operator; a system's appliance is never root's."""
    system = any(plan.home.absolute().is_relative_to(folder) for folder in _SYSTEM_HOMES)
    if system and plan.uid == 0:
        raise CloisterError(
            "OPERATOR_IS_ROOT",
            f"{plan.home} is a system's home and root is no operator of it; name a person's user",
            grpc.StatusCode.PERMISSION_DENIED,
        )
    if not system and plan.uid != os.getuid():
        raise CloisterError(
            "OPERATOR_NOT_CREATOR",
            f"{plan.home} is a private home, its first operator is who makes it (user id {os.getuid()})",
            grpc.StatusCode.PERMISSION_DENIED,
        )


def _check_free(home: Path) -> None:
    """Refuse a home that is in use, complete, or holds what init would have to overwrite."""
    for path in sorted((home / "run").glob("*.sock")):
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.connect(str(path))
            raise CloisterError(
                "RUNNING", f"a process answers at {path}; stop it first", grpc.StatusCode.FAILED_PRECONDITION
            )
    if (home / "control").exists():
        raise CloisterError(
            "ALREADY_INITIALISED",
            f"{home} is an appliance already; choose another home",
            grpc.StatusCode.ALREADY_EXISTS,
        )
    interrupted = (home / _BUILD).exists()
    full = [name for name in _FOLDERS if (home / name).is_dir() and any((home / name).iterdir())]
    if full and not interrupted:
        raise CloisterError(
            "HOME_NOT_EMPTY",
            f"{home} holds {', '.join(full)} and no appliance; move them away or choose another home",
            grpc.StatusCode.FAILED_PRECONDITION,
        )


def _move(made: Path, place: Path) -> None:
    """Put a folder into place; what an interrupted init left there was never in use."""
    shutil.rmtree(place, ignore_errors=True)
    made.rename(place)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One init at a time."""
    descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CloisterError(
            "INIT_RUNNING", f"another init works on {home}", grpc.StatusCode.FAILED_PRECONDITION
        ) from None
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plan(args: argparse.Namespace) -> Plan:
    """The plan that the words describe.

    Raises:
        CloisterError: a word is not what it should be.
    """
    name, _, user = args.operator.partition("=")
    return Plan(
        home=args.home.absolute(),
        operator=check_name(name, "--operator"),
        uid=_uid(user),
        site=check_name(args.site, "--site", _LONGEST_SITE),
        profile=args.profile,
        listen_names=tuple(map(_listen_name, args.listen_name)),
        root=_trust_root(args.root) if args.root else None,
    )


def _uid(user: str) -> int:
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        if user.isdecimal():
            return int(user)
    raise CloisterError("USER_UNKNOWN", "--operator NAME=USER: USER is no user of this machine")


def _listen_name(name: str) -> str:
    """A host name or address, without the blanks and line ends that no certificate may hold."""
    if not name or len(name) > 253 or not all(c.isascii() and (c.isalnum() or c in ".-:") for c in name):
        raise CloisterError("INVALID_NAME", "--listen-name: give a host name or an address")
    return name


def _trust_root(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_ROOT_BYTES + 1)
        if len(content) > _MOST_ROOT_BYTES or not isinstance(json.loads(content), dict):
            raise ValueError("not a root")
    except (OSError, ValueError):
        raise CloisterError(
            "TRUST_ROOT_UNREADABLE", f"{path} is no root of trust; make one with `cloister trust init`"
        ) from None
    return content


def main(argv: list[str] | None = None) -> int:
    """Run `init`; the exit status: 0, 1 failed, 2 bad usage, 3 refused."""
    parser = argparse.ArgumentParser(prog="cloister init", description="Make a new appliance in a home directory.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--operator", required=True, metavar="NAME=USER")
    parser.add_argument("--site", required=True)
    parser.add_argument("--profile", choices=("site", "demo"), default="site")
    parser.add_argument("--listen-name", action="append", default=[], metavar="NAME")
    parser.add_argument("--root", type=Path, metavar="ROOT.json")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    os.umask(0o077)
    try:
        facts = initialise(_plan(args))
    except CloisterError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT.get(error.status, _REFUSED)
    except OSError as error:
        print(f"error: INIT_FAILED: {error}; run it again", file=sys.stderr)
        return 1
    print(json.dumps(facts) if args.json else "\n".join(f"{key:<20}{value}" for key, value in facts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
