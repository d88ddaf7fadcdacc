"""Tickets: what Authorize found out, kept for a minute until Admit uses it up. In memory only."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from appliance.control.identity.callers import Principal
from appliance.errors import CloisterError

LIFE_S = 60.0
_MOST_TICKETS = 20_000


@dataclass(frozen=True)
class Ticket:
    """A request that may be admitted."""

    principal: Principal
    method: str
    request_id: str
    gateway_id: str
    model: str
    deployment: str
    model_digest: str
    max_context_tokens: int


class TicketBook:
    """The tickets given out and not yet used.

    Args:
        monotonic: the clock, seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._tickets: dict[str, tuple[float, Ticket]] = {}

    def issue(self, ticket: Ticket) -> str:
        """A name for `ticket`, good for one `take` within a minute.

        Raises:
            CloisterError: TOO_MANY_TICKETS, more requests wait for admission than any box serves.
        """
        self._drop_expired()
        if len(self._tickets) >= _MOST_TICKETS:
            raise CloisterError(
                "TOO_MANY_TICKETS", "too many requests wait for admission", grpc.StatusCode.RESOURCE_EXHAUSTED
            )
        name = secrets.token_urlsafe(16)
        self._tickets[name] = (self._monotonic() + LIFE_S, ticket)
        return name

    def take(self, name: str) -> Ticket:
        """The ticket of that name, which is then gone.

        Raises:
            CloisterError: TICKET_INVALID.
        """
        self._drop_expired()
        entry = self._tickets.pop(name, None)
        if entry is None:
            raise CloisterError(
                "TICKET_INVALID",
                "the ticket is unknown, used or older than a minute; authorize again",
                grpc.StatusCode.FAILED_PRECONDITION,
            )
        return entry[1]

    def _drop_expired(self) -> None:
        """Forget what is too old; tickets lie in the order of their expiry."""
        now = self._monotonic()
        while self._tickets:
            name = next(iter(self._tickets))
            if self._tickets[name][0] > now:
                break
            del self._tickets[name]
