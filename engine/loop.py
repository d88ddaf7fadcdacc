"""The synchronous engine loop: plan a step, execute it, commit what it brought. One thread calls it, nobody else.

A bad request kills only itself: a step that raises is carried out again request by request, and the one that
raises alone ends with an error. The loop knows no tensor; it is the oracle of any faster loop.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple, Protocol

from engine.detokenizer import Detokenizer, Vocabulary
from engine.errors import EngineError
from engine.options import EngineOptions
from engine.plan import PlanRow, ResultRow, StepPlan, StepResult
from engine.request import End, EndReason, Request
from engine.scheduler import Scheduler

log = logging.getLogger(__name__)


class Runner(Protocol):
    """Whoever carries out a plan."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows."""


class StepRow(NamedTuple):
    """What one step brought one request.

    Attributes:
        handle: the request.
        token_ids: new tokens, an end token included.
        text: new text, whole characters only.
        end: set in the request's last row.
    """

    handle: int
    token_ids: tuple[int, ...]
    text: str
    end: End | None


class EngineStatus(NamedTuple):
    """Counters of the loop; the last three count since the start."""

    waiting: int
    running: int
    blocks_total: int
    blocks_free: int
    steps: int
    tokens_generated: int
    tokens_prefilled: int


class EngineLoop:
    """All requests of one deployment.

    Args:
        runner: carries out plans.
        scheduler: makes them.
        vocabulary: the bytes of each token.
        eos_ids: the model's end tokens.
        options: what it all was built with, every default filled in.
        clock: nanoseconds, monotonic.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        vocabulary: Vocabulary,
        eos_ids: Iterable[int],
        options: EngineOptions,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.scheduler = scheduler
        self.options = options
        self._runner = runner
        self._vocabulary = vocabulary
        self._eos_ids = frozenset(eos_ids)
        self._clock = clock
        self._requests: dict[int, tuple[Request, Detokenizer]] = {}
        self._aborted: list[StepRow] = []
        self._generated = 0
        self._prefilled = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` would return or compute anything."""
        return bool(self._requests or self._aborted)

    @property
    def max_context_tokens(self) -> int:
        """Prompt and answer together."""
        return self.scheduler.limits.max_context_tokens

    def submit(self, request: Request) -> None:
        """Take `request`, whose handle no request held now may have.

        Raises:
            EngineError: DUPLICATE_HANDLE, TOKEN_OUT_OF_RANGE, CONTEXT_OVERFLOW or KV_TOO_SMALL.
        """
        if request.handle in self._requests:
            raise EngineError("DUPLICATE_HANDLE", f"a request with handle {request.handle} is running")
        if not 0 <= min(request.prompt) <= max(request.prompt) < len(self._vocabulary):
            raise EngineError("TOKEN_OUT_OF_RANGE", f"the model has tokens 0 to {len(self._vocabulary) - 1}")
        self.scheduler.submit(request)
        request.submitted_ns = self._clock()
        self._requests[request.handle] = request, Detokenizer(self._vocabulary, request.stop)

    def abort(self, handle: int) -> None:
        """End a request now: its pages are free on return, its last row comes with the next step.

        A handle that is not held is ignored: its request may just have ended.
        """
        if handle in self._requests:
            request, _ = self._requests[handle]
            self._aborted.append(self._finish(request, (), "", End(EndReason.ABORTED)))

    def step(self) -> list[StepRow]:
        """Compute one step; what it brought, the ends of requests aborted since the last one included."""
        rows, self._aborted = self._aborted, []
        plan = self.scheduler.plan()
        if plan is None:
            return rows
        now = self._clock()
        for planned in plan.rows:
            request, _ = self._requests[planned.handle]
            request.scheduled_ns = request.scheduled_ns or now
        result, failed = self._execute(plan)
        rows.extend(self._commit(plan, result))
        rows.extend(self._fail(handle, error) for handle, error in failed)
        return rows

    def status(self) -> EngineStatus:
        """The counters now."""
        scheduler = self.scheduler
        return EngineStatus(
            waiting=scheduler.num_waiting,
            running=scheduler.num_running,
            blocks_total=scheduler.pool.num_blocks,
            blocks_free=scheduler.pool.num_free,
            steps=scheduler.num_steps,
            tokens_generated=self._generated,
            tokens_prefilled=self._prefilled,
        )

    def _execute(self, plan: StepPlan) -> tuple[StepResult, list[tuple[int, EngineError]]]:
        """The result of the rows that could be computed, and the errors of those that could not."""
        try:
            return self._runner.execute(plan), []
        except Exception:
            log.exception("step failed", extra={"step": plan.step, "rows": len(plan.rows)})
        done: list[ResultRow] = []
        failed: list[tuple[int, EngineError]] = []
        for row in plan.rows:
            self._execute_alone(plan, row, done, failed)
        return StepResult(plan.step, tuple(done)), failed

    def _execute_alone(
        self, plan: StepPlan, row: PlanRow, done: list[ResultRow], failed: list[tuple[int, EngineError]]
    ) -> None:
        """Carry out one row of a failed plan; what the plan scrubs and sets up rides along until one succeeds."""
        alone = plan._replace(rows=(row,)) if not done else StepPlan(plan.step, (row,))
        try:
            done.extend(self._runner.execute(alone).rows)
        except Exception as error:
            log.exception("request failed", extra={"step": plan.step, "handle": row.handle})
            message = f"the step that computed this request failed with {type(error).__name__}"
            failed.append((row.handle, EngineError("ENGINE_STEP_FAILED", message)))

    def _commit(self, plan: StepPlan, result: StepResult) -> Iterable[StepRow]:
        """Take over what the step computed; the rows for whom it meant something."""
        self.scheduler.commit(plan, result)
        planned = {row.handle: row for row in plan.rows}
        now = self._clock()
        for done in result.rows:
            request, _ = self._requests[done.handle]
            self._prefilled += max(
                0, min(planned[done.handle].end, len(request.prompt)) - planned[done.handle].start
            )
            if done.fault:
                yield self._fail(done.handle, EngineError(done.fault, "the model's numbers overflowed"))
            elif done.token_ids:
                yield self._take(request, done.token_ids, now)

    def _take(self, request: Request, token_ids: tuple[int, ...], now: int) -> StepRow:
        """Append new tokens to the answer, up to the one that ends it."""
        request.first_token_ns = request.first_token_ns or now
        request.last_token_ns = now
        text = ""
        for count, token in enumerate(token_ids, 1):
            request.tokens.append(token)
            self._generated += 1
            new, end = self._read(request, token)
            text += new
            if end is not None:
                return self._finish(request, token_ids[:count], text, end)
        return StepRow(request.handle, token_ids, text, None)

    def _read(self, request: Request, token: int) -> tuple[str, End | None]:
        """The text that `token` completes, and why the answer ends with it, if it does."""
        _, detokenizer = self._requests[request.handle]
        stop = request.stop
        if token in stop.token_ids or (token in self._eos_ids and not stop.ignore_eos):
            kept = detokenizer.push(token).text if stop.include_stop else ""
            return kept + detokenizer.flush().text, End(EndReason.STOP, stop_token_id=token)
        piece = detokenizer.push(token)
        if piece.stop:
            return piece.text, End(EndReason.STOP, stop_string=piece.stop)
        if request.num_generated < request.limit:
            return piece.text, None
        rest = detokenizer.flush()
        reason = EndReason.STOP if rest.stop else EndReason.LENGTH
        return piece.text + rest.text, End(reason, stop_string=rest.stop)

    def _fail(self, handle: int, error: EngineError) -> StepRow:
        request, _ = self._requests[handle]
        return self._finish(
            request, (), "", End(EndReason.ERROR, error_code=error.code, error_message=error.message)
        )

    def _finish(self, request: Request, token_ids: tuple[int, ...], text: str, end: End) -> StepRow:
        """Forget `request` and free its pages; its last row, with the counts and times of its life."""
        del self._requests[request.handle]
        prompt_tokens = min(request.num_computed, len(request.prompt))
        self.scheduler.remove(request)
        first = request.first_token_ns
        end = replace(
            end,
            prompt_tokens=prompt_tokens,
            completion_tokens=request.num_generated,
            queue_ns=(request.scheduled_ns or self._clock()) - request.submitted_ns,
            prefill_ns=first - request.scheduled_ns if first else 0,
            decode_ns=request.last_token_ns - first,
        )
        return StepRow(request.handle, token_ids, text, end)
