"""The login socket: the kernel says which user connects, and that user's operator gets a session for ten minutes.

gRPC never looks at SO_PEERCRED (grpc issue 28755), so this is a plain Unix socket. Whoever connects gets one line
of JSON, {"session", "operator", "expires"} or {"error", "message"}, and the connection is closed. The session's
token goes into the metadata of admin calls as `cloister-session`; each use prolongs it. Tokens are kept as
digests, in memory.

Source: unix(7), SO_PEERCRED; proc(5), loginuid (tells who stands behind sudo).
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from sqlalchemy import select
from sqlalchemy.orm import Session

from appliance.control import records
from appliance.control.db.database import Database
from appliance.control.db.models import Operator
from appliance.control.journal import Journal
from appliance.errors import CloisterError
from appliance.policy import Role

METADATA_KEY = "cloister-session"
LIFE_S = 600.0
_CREDENTIALS = struct.Struct("=iII")
_NO_LOGIN_UID = 0xFFFFFFFF

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoggedIn:
    """An operator in a session."""

    name: str
    roles: frozenset[Role]


class Sessions:
    """The sessions in force.

    Args:
        monotonic: the clock, seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._sessions: dict[bytes, tuple[float, LoggedIn]] = {}

    def begin(self, operator: LoggedIn) -> str:
        """A token for ten minutes of `operator`."""
        now = self._monotonic()
        self._sessions = {digest: entry for digest, entry in self._sessions.items() if entry[0] > now}
        token = secrets.token_urlsafe(32)
        self._sessions[_digest(token)] = (now + LIFE_S, operator)
        return token

    def operator(self, token: str) -> LoggedIn:
        """Whose token this is; its ten minutes begin anew.

        Raises:
            CloisterError: SESSION_INVALID.
        """
        digest, now = _digest(token), self._monotonic()
        expires, operator = self._sessions.get(digest, (now, None))
        if operator is None or expires <= now:
            self._sessions.pop(digest, None)
            raise CloisterError(
                "SESSION_INVALID",
                "no session, or it has expired; log in again at the login socket",
                grpc.StatusCode.UNAUTHENTICATED,
            )
        self._sessions[digest] = (now + LIFE_S, operator)
        return operator


class LoginBroker:
    """Serves the login socket.

    Args:
        database: control.db, for the operators.
        journal: every login is recorded.
        sessions: where sessions are begun.
    """

    def __init__(self, database: Database, journal: Journal, sessions: Sessions) -> None:
        self._database = database
        self._journal = journal
        self._sessions = sessions

    async def listen(self, path: Path) -> asyncio.Server:
        """Serve on the socket `path`, mode 0600, replacing what a dead predecessor left there."""
        path.unlink(missing_ok=True)  # noqa: ASYNC240  # one system call, before anything is served
        previous = os.umask(0o177)
        try:
            return await asyncio.start_unix_server(self._serve, path)
        finally:
            os.umask(previous)

    async def _serve(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await self._answer(writer.get_extra_info("socket"))
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except ConnectionError:
            log.info("somebody left before the login was answered")
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, sock: socket.socket) -> dict[str, str]:
        pid, uid, _gid = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        try:
            operator = await self._database.run(lambda s: _operator_of(s, uid))
            facts: records.Facts = {"uid": uid, "login_uid": _login_uid(pid)}
            if operator is None:
                await self._journal.note(records.login("", "deny", {**facts, "reason": "OPERATOR_UNKNOWN"}))
                return {"error": "OPERATOR_UNKNOWN", "message": f"user id {uid} is no operator of this appliance"}
            await self._journal.note(records.login(operator.name, "allow", facts))
        except CloisterError as error:
            return {"error": error.code, "message": error.message}
        expires = datetime.fromtimestamp(time.time() + LIFE_S, UTC).isoformat(timespec="seconds")
        return {"session": self._sessions.begin(operator), "operator": operator.name, "expires": expires}


def _operator_of(session: Session, uid: int) -> LoggedIn | None:
    row = session.scalars(select(Operator).where(Operator.uid == uid).order_by(Operator.created_ns)).first()
    return LoggedIn(row.name, frozenset(map(Role, row.roles.split(",")))) if row else None


def _login_uid(pid: int) -> int | None:
    """Who logged in to the machine, before any sudo; None where the kernel does not say."""
    try:
        number = int(Path(f"/proc/{pid}/loginuid").read_text())
    except (OSError, ValueError):
        return None
    return None if number == _NO_LOGIN_UID else number


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
