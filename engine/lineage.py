"""Whose prefix a request shares: the root of its chain, and the request with the same prompt that it waits for.

Several answers to one prompt are requests of which all but the first follow the first. They are held back, outside
any queue, until its prompt is computed, and then find it in the prefix cache. Without a salt a request shares with
nobody but them: the engine makes a root up for the group, and the cache forgets it when the last of them is gone.
"""

from engine.prefix_cache import chain_root
from engine.request import Request


class Lineage:
    """Every request that the scheduler knows, by handle.

    Args:
        model_digest: of the model that computes the pages.
    """

    def __init__(self, model_digest: str) -> None:
        self._model_digest = model_digest
        self._known: dict[int, Request] = {}
        self._roots: dict[int, bytes] = {}
        self._held: dict[int, list[Request]] = {}  # by the handle of whom they follow
        self._private_roots = 0

    @property
    def num_held(self) -> int:
        """Requests that wait for the one they follow."""
        return sum(map(len, self._held.values()))

    def add(self, request: Request) -> bool:
        """Take `request` in; whether it may be queued now, not held back."""
        leader = self._leader(request)
        self._known[request.handle] = request
        self._roots[request.handle] = self._new_root(request) if leader is None else self._roots[leader.handle]
        if leader is None or leader.reached >= len(leader.prompt):
            return True
        self._held.setdefault(leader.handle, []).append(request)
        return False

    def root(self, request: Request) -> bytes:
        """Where the prefix chain of `request` starts."""
        return self._roots[request.handle]

    def holds(self, request: Request) -> bool:
        """Whether `request` is held back."""
        return any(request in held for held in self._held.values())

    def release(self, leader: Request) -> list[Request]:
        """The requests that wait no longer, in order, now that the prompt of `leader` is computed."""
        return self._held.pop(leader.handle, [])

    def remove(self, request: Request) -> list[Request]:
        """Forget `request`, held back or not; the follower that may be queued in its place, if it had any.

        The other followers follow that one.
        """
        for handle, held in list(self._held.items()):
            self._held[handle] = [other for other in held if other is not request]
        del self._known[request.handle], self._roots[request.handle]
        followers = self._held.pop(request.handle, [])
        if followers[1:]:
            self._held[followers[0].handle] = followers[1:]
        return followers[:1]

    def ends(self, request: Request, root: bytes) -> bool:
        """Whether `root`, of the removed `request`, was private, and its last holder is gone."""
        return not request.salt and root not in self._roots.values()

    def _leader(self, request: Request) -> Request | None:
        """Whom `request` follows: a known request of the same owner."""
        leader = None if request.follows is None else self._known.get(request.follows)
        same = leader is not None and (leader.scope, leader.salt) == (request.scope, request.salt)
        return leader if same else None

    def _new_root(self, request: Request) -> bytes:
        if request.salt:
            return chain_root(request.scope, request.salt, self._model_digest)
        self._private_roots += 1
        number = self._private_roots.to_bytes(8, "little")
        return chain_root(request.scope, number, self._model_digest, private=True)
