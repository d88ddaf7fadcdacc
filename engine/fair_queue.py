"""Waiting requests, in the order that gives every scope its share: start-time fair queueing by tokens.

Each scope has a counter of the tokens computed for it, divided by its requests' weight; the scope that is behind
comes next, and within it the oldest request. A scope that comes back from idleness starts where those that waited
meanwhile, or else the one admitted last, have got to by then: it is neither owed for the time it asked for nothing
nor forgiven what it took.

Source: Goyal, Vin and Cheng, "Start-time Fair Queuing", SIGCOMM 1996; Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024 (counters of tokens, lifted on return).
"""

from collections import deque
from collections.abc import Iterable

from engine.request import Request


class FairQueue:
    """The requests of one deployment that are not admitted yet.

    It keeps one number for every scope it has ever seen; scopes are tenants, of which there are few.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Request]] = {}
        self._served: dict[str, float] = {}  # tokens / weight, per scope
        self._admitted_last: str | None = None  # its counter grows on while its requests run

    def __len__(self) -> int:
        return sum(len(requests) for requests in self._waiting.values())

    def push(self, request: Request) -> None:
        """Queue `request` behind those of its scope."""
        scope = request.scope
        if scope not in self._waiting:
            others = [self._served[waiting] for waiting in self._waiting]
            reached = 0.0 if self._admitted_last is None else self._served[self._admitted_last]
            self._served[scope] = max(self._served.get(scope, 0.0), min(others, default=reached))
            self._waiting[scope] = deque()
        self._waiting[scope].append(request)

    def peek(self) -> Request:
        """The oldest request of the scope that is furthest behind; of two level scopes, the one longer in wait.

        Raises:
            ValueError: nothing waits.
        """
        return self._waiting[min(self._waiting, key=self._served.__getitem__)][0]

    def pop(self, cached: int = 0) -> Request:
        """Take the request that `peek` shows.

        Its prompt, less the `cached` tokens that need not be computed, is charged to its scope: once, and not
        again when the request comes back because it had to give up its pages.
        """
        request = self.peek()
        self._admitted_last = request.scope
        if request.preemptions == 0:
            self.charge(request, len(request.prompt) - cached)
        self.remove(request)
        return request

    def restore(self, request: Request) -> None:
        """Put `request` before those of its scope, of which it was ahead; its scope has not been idle."""
        self._served.setdefault(request.scope, 0.0)
        self._waiting.setdefault(request.scope, deque()).appendleft(request)

    def furthest_ahead(self, scopes: Iterable[str]) -> str:
        """Which of `scopes`, all of them admitted before, has had most for its weight.

        Raises:
            ValueError: there are none.
        """
        return max(scopes, key=self._served.__getitem__)

    def remove(self, request: Request) -> None:
        """Forget a waiting request, uncharged.

        Raises:
            ValueError: it does not wait.
        """
        requests = self._waiting.get(request.scope, deque())
        requests.remove(request)
        if not requests:
            del self._waiting[request.scope]

    def charge(self, request: Request, tokens: int) -> None:
        """Count `tokens` computed for a request that was admitted."""
        self._served[request.scope] += tokens / request.weight
