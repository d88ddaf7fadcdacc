"""The synchronous engine loop: plan a step, execute it, commit what it brought. One thread calls it, nobody else.

A bad request kills only itself: a step that raises is carried out again request by request, and the one that
raises alone ends with an error. A step that runs out of memory is carried out again with less, the newest requests
preempted; the one whose single page is too much ends with an error. When step after step fails for everybody, it
is no request's fault, and the loop raises. The loop knows no tensor; it is the oracle of any faster loop.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple, Protocol

from engine.detokenizer import Detokenizer, Vocabulary
from engine.errors import EngineError, EngineLostError, is_out_of_memory
from engine.options import EngineOptions
from engine.plan import PlanRow, ResultRow, StepPlan, StepResult, TokenLogprob
from engine.request import End, EndReason, Request, Task
from engine.scheduler import Scheduler

LOST_STEPS = 8
"""So many steps in a row that fail for everybody in them are not the fault of a request."""

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
        logprobs: one for each of `token_ids`, where asked for; also where a stop cut their text off.
        prompt_logprobs: of the prompt's tokens from the second on, where asked for: in order over the rows, each
            once, all before the first token of the answer.
        values: the vector or the score that was asked for, in the last row.
    """

    handle: int
    token_ids: tuple[int, ...]
    text: str
    end: End | None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    values: tuple[float, ...] = ()


class EngineStatus(NamedTuple):
    """Counters of the loop: pages and requests now; steps, tokens and preemptions since the start."""

    waiting: int
    running: int
    blocks_total: int
    blocks_free: int
    steps: int
    tokens_generated: int
    tokens_prefilled: int
    blocks_cached: int
    tokens_cached: int
    preemptions: int
    tokens_recomputed: int


class EngineLoop:
    """All requests of one deployment.

    Args:
        runner: carries out plans.
        scheduler: makes them.
        vocabulary: the bytes of each token.
        eos_ids: the model's end tokens.
        options: what it all was built with, every default filled in.
        clock: nanoseconds, monotonic.
        tasks: what can be asked of the model.
        num_types: segments that the model tells apart; 1: none.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        vocabulary: Vocabulary,
        eos_ids: Iterable[int],
        options: EngineOptions,
        clock: Callable[[], int] = time.monotonic_ns,
        tasks: Iterable[Task] = (Task.GENERATE,),
        num_types: int = 1,
    ) -> None:
        self.scheduler = scheduler
        self.options = options
        self._runner = runner
        self._vocabulary = vocabulary
        self._eos_ids = frozenset(eos_ids)
        self._clock = clock
        self._tasks = frozenset(tasks)
        self._num_types = num_types
        self._requests: dict[int, tuple[Request, Detokenizer]] = {}
        self._aborted: list[StepRow] = []
        self._generated = 0
        self._lost_steps = 0  # in a row
        self._lost_prompts: set[int] = set()  # hashes of the prompts in them

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
            EngineError: DUPLICATE_HANDLE, TASK_UNSUPPORTED, TOKEN_OUT_OF_RANGE, INVALID_TYPE_IDS, INVALID_SAMPLING
                (bias of a token that the model has not), CONTEXT_OVERFLOW or KV_TOO_SMALL.
        """
        if request.handle in self._requests:
            raise EngineError("DUPLICATE_HANDLE", f"a request with handle {request.handle} is running")
        self._check(request)
        self.scheduler.submit(request)
        request.submitted_ns = self._clock()
        self._requests[request.handle] = request, Detokenizer(self._vocabulary, request.stop)

    def _check(self, request: Request) -> None:
        """Refuse what the model cannot do, or has not."""
        if request.task not in self._tasks:
            able = ", ".join(sorted(task.value for task in self._tasks))
            raise EngineError("TASK_UNSUPPORTED", f"this model does not {request.task.value}; it can: {able}")
        if not 0 <= min(request.prompt) <= max(request.prompt) < len(self._vocabulary):
            raise EngineError("TOKEN_OUT_OF_RANGE", f"the model has tokens 0 to {len(self._vocabulary) - 1}")
        if any(not 0 <= token < len(self._vocabulary) for token, _ in request.sampling.logit_bias):
            raise EngineError(
                "INVALID_SAMPLING", f"logit_bias: the model has tokens 0 to {len(self._vocabulary) - 1}"
            )
        if request.type_ids and not 0 <= min(request.type_ids) <= max(request.type_ids) < self._num_types:
            raise EngineError("INVALID_TYPE_IDS", f"the model has segments 0 to {self._num_types - 1}")

    def abort(self, handle: int) -> None:
        """End a request now; its last row comes with the next step.

        Its pages are free on return, or once no step that was started reads them. A handle that is not held is
        ignored: its request may just have ended.
        """
        if handle in self._requests:
            request, _ = self._requests[handle]
            self._aborted.append(self._finish(request, (), "", End(EndReason.ABORTED)))

    def step(self) -> list[StepRow]:
        """Compute one step; what it brought, the ends of requests aborted since the last one included.

        Raises:
            EngineLostError: `LOST_STEPS` steps in a row have failed for every one of several requests.
        """
        rows, self._aborted = self._aborted, []
        plan = self.scheduler.plan()
        if plan is None:
            return rows
        rows.extend(self._carry_out(plan))
        return rows

    def status(self) -> EngineStatus:
        """The counters now."""
        scheduler, done = self.scheduler, self.scheduler.counters
        return EngineStatus(
            waiting=scheduler.num_waiting,
            running=scheduler.num_running,
            blocks_total=scheduler.pool.num_blocks,
            blocks_free=scheduler.pool.num_free,
            steps=done.steps,
            tokens_generated=self._generated,
            tokens_prefilled=done.prefilled,
            blocks_cached=scheduler.pool.num_cached,
            tokens_cached=done.cached,
            preemptions=done.preemptions,
            tokens_recomputed=done.recomputed,
        )

    def _stamp(self, plan: StepPlan) -> None:
        """Note when requests were first computed."""
        now = self._clock()
        for planned in plan.rows:
            request, _ = self._requests[planned.handle]
            request.scheduled_ns = request.scheduled_ns or now

    def _carry_out(self, plan: StepPlan) -> Iterable[StepRow]:
        """Execute a plan and commit what it brought."""
        self._stamp(plan)
        plan, result, failed = self._execute(plan)
        self._judge(result, failed)
        yield from self._commit(plan, result)
        yield from [self._fail(handle, error) for handle, error in failed]

    def _execute(self, plan: StepPlan) -> tuple[StepPlan, StepResult, list[tuple[int, EngineError]]]:
        """What was carried out in the end, its result, and the errors of the rows that could not be computed."""
        plan, outcome = self._shrink_to_memory(plan)
        if isinstance(outcome, StepResult):
            return plan, outcome, []
        if outcome.code == "OUT_OF_MEMORY":
            return plan, StepResult(plan.step, ()), [(plan.rows[0].handle, outcome)]
        rows: list[PlanRow] = []
        done: list[ResultRow] = []
        failed: list[tuple[int, EngineError]] = []
        for row in plan.rows:
            # What the plan scrubs and sets up rides along until one row succeeds.
            alone = StepPlan(plan.step, (row,)) if done else plan._replace(rows=(row,))
            alone, outcome = self._shrink_to_memory(alone)
            rows.extend(alone.rows)
            if isinstance(outcome, StepResult):
                done.extend(outcome.rows)
            else:
                failed.append((row.handle, outcome))
        return plan._replace(rows=tuple(rows)), StepResult(plan.step, tuple(done)), failed

    def _shrink_to_memory(self, plan: StepPlan) -> tuple[StepPlan, StepResult | EngineError]:
        """As much of `plan` as memory allows, and what came of it; OUT_OF_MEMORY when one page was too much."""
        outcome, fewer = self._attempt(plan), 1
        while isinstance(outcome, EngineError) and outcome.code == "OUT_OF_MEMORY":
            smaller = self.scheduler.shrink(plan, fewer)
            if smaller is None:
                break
            plan, fewer = smaller, 2 * fewer
            outcome = self._attempt(plan)
        return plan, outcome

    def _judge(self, result: StepResult, failed: list[tuple[int, EngineError]]) -> None:
        """Raise when steps fail whoever is in them.

        The same prompt again and again, alone, is its own fault; memory that runs out is not the device's.
        """
        if any(not row.fault for row in result.rows):
            self._lost_steps = 0
            self._lost_prompts.clear()
        elif any(error.code == "ENGINE_STEP_FAILED" for _, error in failed):
            self._lost_steps += 1
            self._lost_prompts.update(hash(tuple(self._requests[handle][0].prompt)) for handle, _ in failed)
            if self._lost_steps >= LOST_STEPS and len(self._lost_prompts) > 1:
                raise EngineLostError(f"{self._lost_steps} steps in a row failed for everybody in them")

    def _attempt(self, plan: StepPlan) -> StepResult | EngineError:
        """The result, or why there is none; the exception is let go, and with it what the step had allocated."""
        try:
            return self._runner.execute(plan)
        except Exception as error:
            handles = [row.handle for row in plan.rows]
            log.exception("step failed", extra={"step": plan.step, "handles": handles})
            if is_out_of_memory(error):
                return EngineError("OUT_OF_MEMORY", "memory ran out in the step that computed this request alone")
            message = f"the step that computed this request failed with {type(error).__name__}"
            return EngineError("ENGINE_STEP_FAILED", message)

    def _commit(self, plan: StepPlan, result: StepResult) -> Iterable[StepRow]:
        """Take over what the step computed; the rows for whom it meant something."""
        self.scheduler.commit(plan, result)
        judged = {row.handle: row.start for row in plan.rows if row.targets}
        now = self._clock()
        for done in result.rows:
            request, _ = self._requests[done.handle]
            if done.fault:
                yield self._fail(done.handle, EngineError(done.fault, "the model's numbers overflowed"))
                continue
            scored = _unreported(request, judged[done.handle], done) if done.handle in judged else ()
            request.num_scored += len(scored)
            if done.values:
                yield self._deliver(request, done, now)
            elif done.token_ids:
                row = self._take(request, done, now)
                yield row._replace(prompt_logprobs=scored) if scored else row
            elif scored:
                yield StepRow(done.handle, (), "", None, prompt_logprobs=scored)

    def _deliver(self, request: Request, done: ResultRow, now: int) -> StepRow:
        """The vector or score of a request, which ends with it."""
        request.first_token_ns = request.last_token_ns = now
        return self._finish(request, (), "", End(EndReason.STOP))._replace(values=done.values)

    def _take(self, request: Request, done: ResultRow, now: int) -> StepRow:
        """Append new tokens to the answer, up to the one that ends it."""
        request.first_token_ns = request.first_token_ns or now
        request.last_token_ns = now
        token_ids, logprobs, text = done.token_ids, done.logprobs, ""
        for count, token in enumerate(token_ids, 1):
            request.tokens.append(token)
            self._generated += 1
            new, end = self._read(request, token)
            text += new
            if end is not None:
                return self._finish(request, token_ids[:count], text, end)._replace(logprobs=logprobs[:count])
        return StepRow(request.handle, token_ids, text, None, logprobs)

    def _read(self, request: Request, token: int) -> tuple[str, End | None]:
        """The text that `token` completes, and why the answer ends with it, if it does."""
        _, detokenizer = self._requests[request.handle]
        stop = request.stop
        ends = token in stop.token_ids or (token in self._eos_ids and not stop.ignore_eos)
        if ends and request.num_generated > stop.min_tokens:
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
        self.scheduler.remove(request)
        first = request.first_token_ns
        end = replace(
            end,
            prompt_tokens=min(request.reached, len(request.prompt)),
            completion_tokens=request.num_generated,
            queue_ns=(request.scheduled_ns or self._clock()) - request.submitted_ns,
            prefill_ns=first - request.scheduled_ns if first else 0,
            decode_ns=request.last_token_ns - first,
            cached_prompt_tokens=request.cached_prompt_tokens,
            recomputed_tokens=request.recomputed_tokens,
            preemptions=request.preemptions,
        )
        return StepRow(request.handle, token_ids, text, end)


def _unreported(request: Request, start: int, done: ResultRow) -> tuple[TokenLogprob, ...]:
    """Of what a row from `start` on says of the prompt's tokens, what none had said before a preemption."""
    return done.prompt_logprobs[max(0, request.num_scored - start) :]
