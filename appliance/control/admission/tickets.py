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
# Of one tenant, more than any gateway walks at once: what is beyond them was left behind by calls that ended
# before they were admitted, and the oldest makes room.
_MOST_OF_A_TENANT = 1024


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
        self._of_tenant: dict[str, dict[str, None]] = {}

    def issue(self, ticket: Ticket) -> str:
        """A name for `ticket`, good for one `take` within a minute, or until its tenant has got very many more.

        Raises:
            CloisterError: TOO_MANY_TICKETS, more requests wait for admission than any box serves.
        """
        self._drop_expired()
        siblings = self._of_tenant.get(ticket.principal.tenant, {})
        if len(siblings) >= _MOST_OF_A_TENANT:
            self._drop(next(iter(siblings)))
        if len(self._tickets) >= _MOST_TICKETS:
            raise CloisterError(
                "TOO_MANY_TICKETS", "too many requests wait for admission", grpc.StatusCode.RESOURCE_EXHAUSTED
            )
        name = secrets.token_urlsafe(16)
        self._tickets[name] = (self._monotonic() + LIFE_S, ticket)
        self._of_tenant.setdefault(ticket.principal.tenant, {})[name] = None
        return name

    def take(self, name: str) -> Ticket:
        """The ticket of that name, which is then gone.

        Raises:
            CloisterError: TICKET_INVALID.
        """
        self._drop_expired()
        if name not in self._tickets:
            raise CloisterError(
                "TICKET_INVALID",
                "the ticket is unknown, used or older than a minute; authorize again",
                grpc.StatusCode.FAILED_PRECONDITION,
            )
        return self._drop(name)

    def _drop_expired(self) -> None:
        """Forget what is too old; tickets lie in the order of their expiry."""
        now = self._monotonic()
        while self._tickets:
            name = next(iter(self._tickets))
            if self._tickets[name][0] > now:
                break
            self._drop(name)

    def _drop(self, name: str) -> Ticket:
        _, ticket = self._tickets.pop(name)
        siblings = self._of_tenant[ticket.principal.tenant]
        del siblings[name]
        if not siblings:
            del self._of_tenant[ticket.principal.tenant]
        return ticket
