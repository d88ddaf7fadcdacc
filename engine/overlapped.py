"""The loop for devices that compute while the host does something else: a step starts before the last one is read.

While a step runs, the tokens of the one before it become text, stops are looked for, and the next plan is made, in
which a row names a token that is not known yet by its place. A request whose answer turns out to have ended is
computed once in vain, and what that brings is dropped. Where a plan needs what is not known, tokens for penalties
or pages of somebody who may just have ended, the step before is read first, as in the synchronous loop.

Every answer is the one that `EngineLoop` gives. A step that fails, and the one that was started behind it, leave
nothing: what the first was to compute is computed anew, synchronously, with all that means for bad requests.

Source: the order follows Zhong et al., "NanoFlow", 2024, section 4 (asynchronous scheduling).
"""

import logging
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from engine.loop import EngineLoop, Runner, StepRow
from engine.plan import StepPlan, StepResult

log = logging.getLogger(__name__)

_Started = tuple[StepPlan, Callable[[], StepResult]]


@runtime_checkable
class StartingRunner(Runner, Protocol):
    """A runner over a device that computes by itself."""

    @property
    def overlaps(self) -> bool:
        """Whether it does."""

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Begin to compute the plan's rows, of which none asks for more than a token; what waits for the result.

        A token id -1 - i stands for what place i of the step started before draws. Results are read in order, each
        before the step after the next is started.
        """


class OverlappedLoop(EngineLoop):
    """All requests of one deployment on such a device; made as `EngineLoop` is."""

    _started: _Started | None = None

    @property
    def has_work(self) -> bool:
        """Whether `step` would return or compute anything, or wait for what was computed."""
        return super().has_work or self._started is not None

    def step(self) -> list[StepRow]:
        """Start a step, and read the one before it; what that brought. See `EngineLoop.step`."""
        rows, self._aborted = self._aborted, []
        if self._started is None:
            plan = self.scheduler.plan()
            if plan is None:
                return rows
            self._started = self._start(plan) if self.scheduler.overlaps(plan) else None
            if self._started is None:
                rows.extend(self._carry_out(plan))
                return rows
        rows.extend(self._follow(*self._started))
        return rows

    def _follow(self, plan: StepPlan, read: Callable[[], StepResult]) -> list[StepRow]:
        """Start the step after `plan`, if it can be planned, and take over what `plan` brought."""
        ahead = self.scheduler.plan_ahead()
        self._started = None if ahead is None else self._start(ahead)
        try:
            result = read()
        except Exception:
            log.exception("step failed", extra={"step": plan.step, "handles": [row.handle for row in plan.rows]})
            return self._again(plan)
        result = self.scheduler.land(plan, result)
        self._judge(result, [])
        return list(self._commit(plan, result))

    def _start(self, plan: StepPlan) -> _Started | None:
        """Start `plan`; None where it fails already."""
        runner = self._runner
        if not isinstance(runner, StartingRunner):
            raise TypeError("this runner cannot start a step without waiting for it")
        try:
            read = runner.start(plan)
        except Exception:
            handles = [row.handle for row in plan.rows]
            log.exception("step could not be started", extra={"step": plan.step, "handles": handles})
            return None
        self.scheduler.depart(plan)
        self._stamp(plan)
        return plan, read

    def _again(self, plan: StepPlan) -> list[StepRow]:
        """Wait for what was started behind a step that failed, drop it, and compute the step synchronously."""
        if self._started is not None:
            _, read = self._started
            self._started = None
            try:
                read()
            except Exception:
                log.info("the step behind it failed, too", extra={"step": plan.step})
        left = self.scheduler.ground(plan)
        return [] if left is None else list(self._carry_out(left))
