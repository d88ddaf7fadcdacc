"""Decides what each step computes: which requests, how many tokens of each, in which KV pages. No tensor here.

Every request chases `num_tokens` with `num_computed`. Rows that only need their next token go first, so that a
long prompt never stalls a running answer; what is left of the step's budget goes to unfinished prompts in order of
admission, which is fair between scopes (`engine.fair_queue`).

A request is admitted when the pages for its tokens so far fit, less those that the prefix cache has already,
beside what the admitted ones need for theirs and some pages for each to grow. When a step then lacks pages,
requests are preempted: they give up their pages, wait at the head of their scope's queue, and compute again what
the cache no longer has. The request admitted first is never preempted, so one always gets to its end. Each time a
request has been preempted doubles the growth that must be left for it before it, or anybody after it, is admitted:
that soon is its longest answer, so that few preemptions are spent on one request.

Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI 2022
(iteration-level scheduling); Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with
Sarathi-Serve", OSDI 2024 (chunked prefill beside decode); Kwon et al., SOSP 2023, section 4.5 (recomputation).
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.errors import EngineError
from engine.fair_queue import FairQueue
from engine.flights import Flights, Kept
from engine.lineage import Lineage
from engine.plan import FULL, BlockTable, PlanRow, SamplerSetup, StepPlan, StepResult
from engine.request import Request, Task

_Span = tuple[Request, int, int]  # up to which position a step computes it, and how many pages it lacks for that

_CALM_STEPS = 64  # steps that succeed before a step that ran out of memory may be twice as large again


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a step and of a request.

    Attributes:
        max_step_tokens: most tokens computed in one step.
        max_running: most requests admitted at once; with a page's worth of tokens it must fit into a step, so that
            a prompt always moves on.
        max_context_tokens: prompt and answer together.
        whole_blocks: cut prompts only at page borders, as determinism needs: rows of one tile stay together.
        whole_prompts: a prompt is computed in one step and keeps nothing in pages, as an encoder's.
    """

    max_step_tokens: int
    max_running: int
    max_context_tokens: int
    whole_blocks: bool = False
    whole_prompts: bool = False

    @property
    def context(self) -> int:
        """Most tokens of a request: what is computed whole must fit into a step."""
        return (
            min(self.max_context_tokens, self.max_step_tokens) if self.whole_prompts else self.max_context_tokens
        )


@dataclass(slots=True)
class Counters:
    """What was done since the start.

    Attributes:
        steps: steps planned.
        prefilled: prompt tokens computed for the first time.
        cached: prompt tokens taken from the prefix cache when their request was first admitted.
        recomputed: tokens computed again.
        preemptions: times a request had to give up its pages.
    """

    steps: int = 0
    prefilled: int = 0
    cached: int = 0
    recomputed: int = 0
    preemptions: int = 0


class Scheduler:
    """The requests of one deployment, waiting and running, and the pages they own.

    Args:
        pool: the KV pages.
        limits: bounds of a step and of a request.
        model_digest: of the model that fills the pages.
        eos_ids: the model's end tokens.

    Raises:
        ValueError: a step is too small for `max_running` rows and one page of a prompt.
    """

    def __init__(
        self, pool: BlockPool, limits: Limits, model_digest: str = "", eos_ids: Iterable[int] = ()
    ) -> None:
        if limits.max_running < 1 or limits.max_step_tokens < limits.max_running + pool.block_size:
            raise ValueError(
                f"a step of {limits.max_step_tokens} tokens can starve one of {limits.max_running} rows"
            )
        self.pool = pool
        self.limits = limits
        self.counters = Counters()
        self._eos_ids = frozenset(eos_ids)
        self._waiting = FairQueue()
        self._running: dict[int, Request] = {}  # in order of admission
        self._lineage = Lineage(model_digest)
        self._slots = list(reversed(range(limits.max_running)))
        self._refused: dict[int, int] = {}  # by handle: of the available pages, how many it needs
        self._dirty: list[int] = []
        self._new_samplers: dict[int, SamplerSetup] = {}
        self._step_tokens = limits.max_step_tokens
        self._calm = 0
        self._flights = Flights()

    @property
    def num_waiting(self) -> int:
        """Requests not admitted, or not any more."""
        return len(self._waiting) + self._lineage.num_held

    @property
    def num_running(self) -> int:
        """Requests admitted and not ended."""
        return len(self._running)

    def submit(self, request: Request) -> None:
        """Queue `request`; lowers its `limit` to what the context allows.

        Raises:
            EngineError: CONTEXT_OVERFLOW or KV_TOO_SMALL; the request can never run.
        """
        room = self.limits.context - len(request.prompt)
        if room < min(1, request.limit):
            answer = ", one of them for the answer" if request.limit else ""
            raise EngineError(
                "CONTEXT_OVERFLOW",
                f"the prompt has {len(request.prompt)} tokens; the context holds {self.limits.context}{answer}",
            )
        request.limit = min(request.limit, room)
        if self._worst_case(request) > self.pool.num_blocks:
            raise EngineError(
                "KV_TOO_SMALL",
                f"prompt and answer need {self._worst_case(request)} KV pages, the deployment has "
                f"{self.pool.num_blocks}; ask for a shorter answer or load the model with more pages",
            )
        if self._lineage.add(request):
            self._waiting.push(request)

    def remove(self, request: Request) -> None:
        """Forget `request`, waiting or running, and give up its pages."""
        root = self._lineage.root(request)
        self._refused.pop(request.handle, None)
        if request.handle in self._running:
            self._retire(request)
        elif not self._lineage.holds(request):
            self._waiting.remove(request)
        for heir in self._lineage.remove(request):
            self._waiting.restore(heir)
        if self._lineage.ends(request, root):
            self.pool.forget(root)

    def plan(self) -> StepPlan | None:
        """The next step; None when there is nothing to compute.

        Until `commit` reports a row as done, pages to scrub and new sampling slots are named in every plan.
        """
        self._admit()
        rows = tuple(self._row(*span) for span in self._make_room())
        if not rows:
            return None
        self.counters.steps += 1
        return StepPlan(self.counters.steps, rows, tuple(self._new_samplers.values()), tuple(self._dirty))

    def overlaps(self, plan: StepPlan) -> bool:
        """Whether the step after `plan` may be planned before its tokens are known."""
        return all(_is_simple(self._running[row.handle]) for row in plan.rows)

    def depart(self, plan: StepPlan) -> None:
        """`plan`, the last one that was made, was started; until it lands, no page that it reads is given away."""
        self._flights.depart(plan)

    def plan_ahead(self) -> StepPlan | None:
        """The step after the one that was started; None where its tokens, or pages of others, are wanted first.

        Where a row's token is not known yet, -1 - i stands for what place i of the step before draws. A request
        whose token may be its last is computed once more in vain; one that reaches its limit is not.
        """
        before = self._flights.last
        self._admit()
        spans = list(self._spans())
        lacks_pages = sum(missing for _, _, missing in spans) > self.pool.num_available
        if before is None or not spans or lacks_pages or not all(_is_simple(request) for request, _, _ in spans):
            return None
        rows = tuple(self._row(*span) for span in spans)
        samplers = tuple(setup for setup in self._new_samplers.values() if setup not in before.samplers)
        scrub = tuple(block for block in self._dirty if block not in before.scrub)
        self.counters.steps += 1
        return StepPlan(self.counters.steps, rows, samplers, scrub)

    def land(self, plan: StepPlan, result: StepResult) -> StepResult:
        """The started `plan` is done: of its `result`, what was computed for requests that have not ended."""
        rows = tuple(row for row in result.rows if self._flights.holds(plan.step, row.handle))
        self._give_back(plan.step)
        self._settle(plan, result)
        return result._replace(rows=rows)

    def ground(self, plan: StepPlan) -> StepPlan | None:
        """Nothing that was started is in the device any more; what is to be computed in place of `plan`.

        The steps before it have landed, so that all its tokens are known.
        """
        left = [row for row in plan.rows if self._flights.holds(plan.step, row.handle)]
        self._give_back(self.counters.steps)
        rows = tuple(
            row._replace(token_ids=tuple(self._running[row.handle].tokens[row.start : row.end])) for row in left
        )
        return plan._replace(rows=rows) if rows else None

    def shrink(self, plan: StepPlan, fewer: int) -> StepPlan | None:
        """A smaller plan in place of one that ran out of memory; None when it cannot be smaller.

        The `fewer` requests of it that were admitted last are preempted, but for one, whose row is halved when it
        is alone and longer than a page, and may be cut. Steps stay as small for a while.
        """
        rows = plan.rows
        if len(rows) > 1:
            planned = {row.handle for row in rows}
            order = [request for request in self._running.values() if request.handle in planned]
            for request in reversed(order[max(1, len(order) - fewer) :]):
                self._preempt(request)
            rows = tuple(row for row in rows if row.handle in self._running)
        elif len(rows[0].token_ids) > self.pool.block_size and not self.limits.whole_prompts:
            half = self.pool.blocks_for(len(rows[0].token_ids)) // 2 * self.pool.block_size
            token_ids, targets = rows[0].token_ids[:half], rows[0].targets[:half]
            rows = (rows[0]._replace(token_ids=token_ids, targets=targets, sampling_slot=None, pooled=False),)
        else:
            return None
        self._step_tokens = max(self.pool.block_size, sum(len(row.token_ids) for row in rows))
        self._calm = 0
        return plan._replace(rows=rows)

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Move each request that the step brought forward to what it has computed now.

        Pages that it filled are registered for their tokens: none before its keys and values are there.
        """
        rows, size = {row.handle: row for row in plan.rows}, self.pool.block_size
        for done in result.rows:
            request, end = self._running[done.handle], rows[done.handle].end
            start = request.num_computed
            self._advance(request, end)
            self._waiting.charge(request, len(done.token_ids))
            if done.fault:
                self.pool.discard(request.blocks)  # nobody else must meet these numbers
                continue
            if start // size < end // size and not self.limits.whole_prompts:
                self._register(request, start // size)
            if start < len(request.prompt) <= end:
                self._refused.clear()  # they may share its pages now
                for follower in reversed(self._lineage.release(request)):
                    self._waiting.restore(follower)
        self._settle(plan, result)
        if result.rows:
            self._calm_down()

    def _settle(self, plan: StepPlan, result: StepResult) -> None:
        """What a plan scrubs and sets up need not be named again once a row of it is done."""
        if result.rows:
            self._dirty = [block for block in self._dirty if block not in plan.scrub]
            for setup in plan.samplers:
                if self._new_samplers.get(setup.slot) is setup:
                    del self._new_samplers[setup.slot]

    def _give_back(self, step: int) -> None:
        """What waited for steps up to `step` to be done."""
        for kept in self._flights.land(step):
            self.pool.release(kept.blocks)
            if kept.slot >= 0:
                self._slots.append(kept.slot)

    def check(self) -> None:
        """Verify that pages are conserved and that only running requests own any.

        Raises:
            RuntimeError: a page is lost, doubled or owned by nobody known.
        """
        self.pool.check()
        owned = Counter(block for request in self._running.values() for block in request.blocks)
        owned.update(self._flights.kept_blocks)
        if owned != self.pool.owners():
            raise RuntimeError(
                f"KV pages astray: requests own {len(owned)} pages {owned.total()} times; the pool counts "
                f"{self.pool.num_owned} owned, {self.pool.num_cached} cached, {self.pool.num_free} free"
            )

    def _admit(self) -> None:
        """Admit requests, fairly, as long as they fit and the step has tokens left for them.

        So a request that is not computed now is not committed to its place yet, and meanwhile its prefix may come
        into the cache.
        """
        if not (self._waiting and self._slots):
            return
        promised = sum(map(self._promised, self._running.values()))
        tokens = self._step_tokens - sum(map(self._pending, self._running.values()))
        most = max(1, self._step_tokens - self.pool.block_size)
        while self._waiting and self._slots and tokens > 0 and len(self._running) < most:
            request = self._waiting.peek()
            if not self._take_prefix(request, promised):
                return  # nobody overtakes, or a large request would wait for ever
            promised += self._promised(request)
            self._start(request)
            tokens -= request.num_pending

    def _take_prefix(self, request: Request, promised: int) -> bool:
        """Let `request` own what the cache has of it, if the rest fits beside the `promised` pages.

        How many of the available pages it would take, cached ones included, changes only with what others own of
        its prefix; so who was refused is not looked up again until that many are there, or a prompt is computed.
        """
        available = self.pool.num_available
        if promised + self._refused.get(request.handle, 0) > available:
            return False
        request.blocks = list(self._cached_prefix(request))
        self.pool.share(request.blocks)
        if promised + self._promised(request) <= self.pool.num_available:
            return True
        self._refused[request.handle] = self._promised(request) + available - self.pool.num_available
        self.pool.release(request.blocks)  # which keeps them from being given up next
        request.blocks = []
        return False

    def _cached_prefix(self, request: Request) -> tuple[int, ...]:
        """Pages that hold the beginning of `request` already; at least its last token is left to be computed.

        What was never computed for this request itself is not skipped when each of its prompt's tokens is to be
        judged.
        """
        if self.limits.whole_prompts:
            return ()
        limit = request.num_tokens - 1
        if request.prompt_logprobs is not None:
            limit = min(limit, request.reached)
        return self.pool.match(self._lineage.root(request), request.tokens, limit)

    def _promised(self, request: Request) -> int:
        """Pages that are left to `request` when others are admitted: for its tokens so far, and to grow."""
        now = self._pages(request.num_tokens)
        growth = min(self._worst_case(request) - now, 1 << request.preemptions)
        return now - len(request.blocks) + max(0, growth)

    def _worst_case(self, request: Request) -> int:
        """Pages for the prompt and the longest answer; the last token's keys and values are never needed."""
        return self._pages(len(request.prompt) + max(0, request.limit - 1))

    def _pages(self, tokens: int) -> int:
        """Pages that the first `tokens` of a request take."""
        return 0 if self.limits.whole_prompts else self.pool.blocks_for(tokens)

    def _start(self, request: Request) -> None:
        """Admit the request that comes next, which owns the pages of its prefix already."""
        cached = len(request.blocks) * self.pool.block_size
        self._waiting.pop(cached)
        self._refused.pop(request.handle, None)
        if request.preemptions == 0:
            request.cached_prompt_tokens = cached
            self.counters.cached += cached
        request.num_computed = cached
        request.reached = max(request.reached, cached)
        request.slot = self._slots.pop()
        self._running[request.handle] = request
        self._new_samplers[request.slot] = self._sampler(request)

    def _sampler(self, request: Request) -> SamplerSetup:
        stop = request.stop
        banned = stop.token_ids if stop.ignore_eos else stop.token_ids | self._eos_ids
        return SamplerSetup(
            slot=request.slot,
            params=request.sampling,
            prompt_length=len(request.prompt),
            logprobs=request.logprobs,
            banned=tuple(sorted(banned)) if stop.min_tokens else (),
            banned_until=len(request.prompt) + stop.min_tokens,
            history=tuple(request.tokens[: request.num_computed]) if request.sampling.uses_history else (),
        )

    def _make_room(self) -> list[_Span]:
        """What the step computes of each request; others are preempted until it has the pages."""
        while True:
            spans = list(self._spans())
            if sum(missing for _, _, missing in spans) <= self.pool.num_available:
                return spans
            self._preempt(self._victim())

    def _victim(self) -> Request:
        """The newest admission of the scope that has had most for its weight; never the oldest of all."""
        _, *others = self._running.values()
        scope = self._waiting.furthest_ahead([request.scope for request in others])
        return next(request for request in reversed(others) if request.scope == scope)

    def _preempt(self, request: Request) -> None:
        """Let `request` give up its pages; it comes next in its scope, and computes what the cache has lost."""
        self._retire(request)
        request.preemptions += 1
        self.counters.preemptions += 1
        self._waiting.restore(request)

    def _retire(self, request: Request) -> None:
        """Take everything back that a running request was given, once no step that was started reads it."""
        del self._running[request.handle]
        step = self._flights.boarded(request.handle)
        self._flights.leave(request.handle)
        self._flights.keep(Kept(step, tuple(request.blocks), request.slot))
        if not step:
            self._give_back(0)
        self._new_samplers.pop(request.slot, None)
        request.blocks, request.slot, request.num_computed = [], -1, 0

    def _spans(self) -> Iterator[_Span]:
        """What of each request to compute, within the step's budget."""
        budget = self._step_tokens
        for request in self._in_turn():
            count = self._count(request, budget)
            if count > 0:
                budget -= count
                end = self._computed(request) + count
                yield request, end, max(0, self._pages(end) - len(request.blocks))

    def _in_turn(self) -> list[Request]:
        """Who is computed before whom: next tokens before prompts, but whole prompts as they were admitted.

        So a long one, which must have a step almost to itself, is not passed over for ever.
        """
        running = list(self._running.values())
        return running if self.limits.whole_prompts else sorted(running, key=lambda r: self._pending(r) > 1)

    def _count(self, request: Request, budget: int) -> int:
        """Tokens of `request` to compute within `budget`."""
        pending = self._pending(request)
        if self.limits.whole_prompts:
            is_first = budget == self._step_tokens  # it may be longer than what steps have shrunk to
            return pending if pending <= budget or is_first else 0
        if pending <= budget or not self.limits.whole_blocks:
            return min(pending, budget)
        return budget - budget % self.pool.block_size

    def _computed(self, request: Request) -> int:
        """Tokens of `request` that are computed once what was started is done."""
        row = self._flights.row(request.handle)
        return request.num_computed if row is None else row.end

    def _known(self, request: Request) -> int:
        """Tokens that it has then, where it is not known to end."""
        row = self._flights.row(request.handle)
        grows = row is not None and row.sampling_slot is not None and request.num_generated + 1 < request.limit
        return request.num_tokens + grows

    def _pending(self, request: Request) -> int:
        """Tokens of `request` that are neither computed nor about to be."""
        return self._known(request) - self._computed(request)

    def _tokens(self, request: Request, start: int, end: int) -> tuple[int, ...]:
        """Tokens of a row; the one that the step before draws is named by its place there."""
        known = tuple(request.tokens[start:end])
        return known if end <= request.num_tokens else (*known, -1 - self._flights.places()[request.handle])

    def _row(self, request: Request, end: int, missing: int) -> PlanRow:
        start = self._computed(request)
        if missing:
            allocation = self.pool.allocate(missing, request.scope)
            request.blocks.extend(allocation.blocks)
            self._dirty.extend(allocation.dirty)
        judged = request.prompt_logprobs is not None
        is_last, generates = end == self._known(request), request.task is Task.GENERATE
        return PlanRow(
            handle=request.handle,
            slot=request.slot,
            start=start,
            token_ids=self._tokens(request, start, end),
            num_draft=0,
            block_tables=(BlockTable(FULL, tuple(request.blocks)),),
            adapter_slot=None,
            sampling_slot=request.slot if is_last and generates else None,
            prompt_logprobs=request.prompt_logprobs or 0,
            targets=tuple(request.prompt[start + 1 : end + 1]) if judged else (),
            pooled=is_last and not generates,
            type_ids=tuple(request.type_ids[start:end]),
        )

    def _advance(self, request: Request, end: int) -> None:
        """Count what was computed of `request`, up to the position `end`."""
        start, before = request.num_computed, request.reached
        request.num_computed = end
        if start < before:
            again = min(end, before) - start
            request.recomputed_tokens += again
            self.counters.recomputed += again
        if end > before:
            request.reached = end
            self.counters.prefilled += max(0, min(end, len(request.prompt)) - max(start, before))

    def _register(self, request: Request, first: int) -> None:
        """Register the full pages of `request` from index `first` on."""
        root, size, blocks = self._lineage.root(request), self.pool.block_size, request.blocks
        step = self._flights.boarded(request.handle)
        for i in range(first, request.num_computed // size):
            parent, own = blocks[i - 1] if i else None, blocks[i]
            self.pool.share((own,))
            blocks[i] = self.pool.register(root, parent, own, request.tokens[i * size : (i + 1) * size])
            self._flights.keep(Kept(step if blocks[i] != own else 0, (own,)))
        self._give_back(0)

    def _calm_down(self) -> None:
        """After enough steps that did not run out of memory, let them grow again."""
        if self._step_tokens < self.limits.max_step_tokens:
            self._calm += 1
            if self._calm == _CALM_STEPS:
                self._calm = 0
                self._step_tokens = min(2 * self._step_tokens, self.limits.max_step_tokens)


def _is_simple(request: Request) -> bool:
    """Whether its draws need no token that was drawn before, and nothing is to be said but the token."""
    asks = request.logprobs is None and request.prompt_logprobs is None
    return asks and request.task is Task.GENERATE and not request.sampling.uses_history
