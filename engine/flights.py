"""Steps that were started and are not known to be done: what they read stays as it is until they are.

A loop that overlaps has at most two: one whose tokens it is about to read, and the one after it. A request that
ends in the meantime leaves its pages and its slot here, and so does whoever gives up a page for another's equal
one: all of it is given back when the last step that was started with it has landed.
"""

from typing import NamedTuple

from engine.plan import PlanRow, StepPlan


class Kept(NamedTuple):
    """What waits for a step to land.

    Attributes:
        step: the last one that was started with it.
        blocks: KV pages, each with an owner less than it seems.
        slot: of a request that has ended; -1: none.
    """

    step: int
    blocks: tuple[int, ...]
    slot: int = -1


class Flights:
    """The steps that were started, in order, and what waits for them."""

    def __init__(self) -> None:
        self._plans: dict[int, StepPlan] = {}
        self._aboard: dict[int, dict[int, PlanRow]] = {}  # by step, by handle: requests that have not ended
        self._kept: list[Kept] = []

    @property
    def kept_blocks(self) -> list[int]:
        """Every page that waits, as often as it does."""
        return [block for kept in self._kept for block in kept.blocks]

    @property
    def last(self) -> StepPlan | None:
        """The step that was started last."""
        return next(reversed(self._plans.values()), None)

    def depart(self, plan: StepPlan) -> None:
        """A step was started."""
        self._plans[plan.step] = plan
        self._aboard[plan.step] = {row.handle: row for row in plan.rows}

    def row(self, handle: int) -> PlanRow | None:
        """What the step that was started last computes of a request."""
        last = self.last
        return None if last is None else self._aboard[last.step].get(handle)

    def places(self) -> dict[int, int]:
        """Where the step that was started last puts the token of each request that it draws one for."""
        last = self.last
        sampled = [] if last is None else [row.handle for row in last.rows if row.sampling_slot is not None]
        return {handle: place for place, handle in enumerate(sampled)}

    def holds(self, step: int, handle: int) -> bool:
        """Whether a step computes a request that has not ended; one that was not started computes all of its."""
        return step not in self._aboard or handle in self._aboard[step]

    def boarded(self, handle: int) -> int:
        """The last step that was started with a request; 0: none."""
        return max((step for step, rows in self._aboard.items() if handle in rows), default=0)

    def leave(self, handle: int) -> None:
        """A request has ended: whoever has its handle next is another."""
        for rows in self._aboard.values():
            rows.pop(handle, None)

    def keep(self, kept: Kept) -> None:
        """Something waits for a step."""
        self._kept.append(kept)

    def land(self, step: int) -> list[Kept]:
        """A step is done, with all before it; what waited for them."""
        for landed in [number for number in self._plans if number <= step]:
            del self._plans[landed], self._aboard[landed]
        free = [kept for kept in self._kept if kept.step <= step]
        self._kept = [kept for kept in self._kept if kept.step > step]
        return free
