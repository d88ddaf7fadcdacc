"""Whose prefix a request shares: the root of its chain, and the request with the same prompt that it waits for.

Several answers to one prompt are requests of which all but the first follow the first. They are held back, outside
any queue, until its prompt is computed, and then find it in the prefix cache. Without a salt a request shares with
nobody but them: the engine makes a root up for the group, and the cache forgets it when the last of them is gone.
"""

from collections import Counter

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
        self._holders: Counter[bytes] = Counter()  # requests of each root
        self._held: dict[int, dict[int, Request]] = {}  # by the handle of whom they follow, then by their own
        self._held_by: dict[int, int] = {}  # whom each of them follows
        self._private_roots = 0

    @property
    def num_held(self) -> int:
        """Requests that wait for the one they follow."""
        return len(self._held_by)

    def add(self, request: Request) -> bool:
        """Take `request` in; whether it may be queued now, not held back."""
        leader = self._leader(request)
        self._known[request.handle] = request
        root = self._new_root(request) if leader is None else self._roots[leader.handle]
        self._roots[request.handle] = root
        self._holders[root] += 1
        if leader is None or leader.reached >= len(leader.prompt):
            return True
        self._hold(leader.handle, {request.handle: request})
        return False

    def root(self, request: Request) -> bytes:
        """Where the prefix chain of `request` starts."""
        return self._roots[request.handle]

    def holds(self, request: Request) -> bool:
        """Whether `request` is held back."""
        return request.handle in self._held_by

    def release(self, leader: Request) -> list[Request]:
        """The requests that wait no longer, in order, now that the prompt of `leader` is computed."""
        followers = self._held.pop(leader.handle, {})
        for handle in followers:
            del self._held_by[handle]
        return list(followers.values())

    def remove(self, request: Request) -> list[Request]:
        """Forget `request`, held back or not; the follower that may be queued in its place, if it had any.

        The other followers follow that one.
        """
        del self._known[request.handle]
        root = self._roots.pop(request.handle)
        self._holders[root] -= 1
        if not self._holders[root]:
            del self._holders[root]
        if self.holds(request):
            del self._held[self._held_by.pop(request.handle)][request.handle]
        followers = self.release(request)
        if followers[1:]:
            self._hold(followers[0].handle, {follower.handle: follower for follower in followers[1:]})
        return followers[:1]

    def ends(self, request: Request, root: bytes) -> bool:
        """Whether `root`, of the removed `request`, was private, and its last holder is gone."""
        return not request.salt and root not in self._holders

    def _hold(self, leader: int, followers: dict[int, Request]) -> None:
        """Let `followers` wait, behind those that do already, for the request with the handle `leader`."""
        self._held.setdefault(leader, {}).update(followers)
        self._held_by.update(dict.fromkeys(followers, leader))

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
