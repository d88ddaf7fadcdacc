"""Decides what each step computes: which requests, how many tokens of each, in which KV pages. No tensor here.

Every request chases `num_tokens` with `num_computed`. Rows that only need their next token go first, so that a
long prompt never stalls a running answer; what is left of the step's budget goes to unfinished prompts in order of
admission, which is fair between scopes (`engine.fair_queue`). A request is admitted only when the pool can hold
its prompt and its longest answer beside those of all admitted ones, so no request is ever stopped for want of a
page.

Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI 2022
(iteration-level scheduling); Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with
Sarathi-Serve", OSDI 2024 (chunked prefill beside decode).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.errors import EngineError
from engine.fair_queue import FairQueue
from engine.plan import FULL, BlockTable, PlanRow, SamplerSetup, StepPlan, StepResult
from engine.request import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a step and of a request.

    Attributes:
        max_step_tokens: most tokens computed in one step.
        max_running: most requests admitted at once; with a page's worth of tokens it must fit into a step, so that
            a prompt always moves on.
        max_context_tokens: prompt and answer together.
        whole_blocks: cut prompts only at page borders, as determinism needs: rows of one tile stay together.
    """

    max_step_tokens: int
    max_running: int
    max_context_tokens: int
    whole_blocks: bool = False


class Scheduler:
    """The requests of one deployment, waiting and running, and the pages they own.

    Args:
        pool: the KV pages.
        limits: bounds of a step and of a request.

    Raises:
        ValueError: a step is too small for `max_running` rows and one page of a prompt.
    """

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        if limits.max_running < 1 or limits.max_step_tokens < limits.max_running + pool.block_size:
            raise ValueError(
                f"a step of {limits.max_step_tokens} tokens can starve one of {limits.max_running} rows"
            )
        self.pool = pool
        self.limits = limits
        self._waiting = FairQueue()
        self._running: dict[int, Request] = {}
        self._slots = list(reversed(range(limits.max_running)))
        self._reserved = 0
        self._dirty: list[int] = []
        self._new_samplers: list[SamplerSetup] = []
        self._step = 0

    @property
    def num_waiting(self) -> int:
        """Requests not admitted yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests admitted and not ended."""
        return len(self._running)

    @property
    def num_steps(self) -> int:
        """Steps planned so far."""
        return self._step

    def submit(self, request: Request) -> None:
        """Queue `request`; lowers its `limit` to what the context allows.

        Raises:
            EngineError: CONTEXT_OVERFLOW or KV_TOO_SMALL; the request can never run.
        """
        room = self.limits.max_context_tokens - len(request.prompt)
        if room < 1:
            raise EngineError(
                "CONTEXT_OVERFLOW",
                f"the prompt has {len(request.prompt)} tokens; the context holds "
                f"{self.limits.max_context_tokens}, one of them for the answer",
            )
        request.limit = min(request.limit, room)
        if self._worst_case(request) > self.pool.num_blocks:
            raise EngineError(
                "KV_TOO_SMALL",
                f"prompt and answer need {self._worst_case(request)} KV pages, the deployment has "
                f"{self.pool.num_blocks}; ask for a shorter answer or load the model with more pages",
            )
        self._waiting.push(request)

    def remove(self, request: Request) -> None:
        """Forget `request`, waiting or running, and free its pages."""
        if self._running.pop(request.handle, None) is None:
            self._waiting.remove(request)
            return
        self.pool.release(request.blocks)
        self._reserved -= self._worst_case(request) - len(request.blocks)
        self._slots.append(request.slot)
        request.blocks, request.slot = [], -1

    def plan(self) -> StepPlan | None:
        """The next step; None when there is nothing to compute.

        Until `commit` reports a row as done, pages to scrub and new sampling slots are named in every plan.
        """
        self._admit()
        rows = tuple(self._rows())
        if not rows:
            return None
        self._step += 1
        return StepPlan(self._step, rows, tuple(self._new_samplers), tuple(self._dirty))

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Move each request that the step brought forward to what it has computed now."""
        rows = {row.handle: row for row in plan.rows}
        for done in result.rows:
            request = self._running[done.handle]
            request.num_computed = rows[done.handle].end
            self._waiting.charge(request, len(done.token_ids))
        if result.rows:
            self._dirty.clear()
            self._new_samplers.clear()

    def check(self) -> None:
        """Verify that pages are conserved and that only running requests own any.

        Raises:
            RuntimeError: a page is lost, doubled or owned by nobody known.
        """
        self.pool.check()
        owned = sum(len(request.blocks) for request in self._running.values())
        reserved = sum(self._worst_case(r) - len(r.blocks) for r in self._running.values())
        if owned != self.pool.num_owned or reserved != self._reserved or reserved > self.pool.num_free:
            raise RuntimeError(
                f"KV pages astray: requests own {owned} and may take {reserved}; the pool counts "
                f"{self.pool.num_owned} owned, {self._reserved} promised, {self.pool.num_free} free"
            )

    def _admit(self) -> None:
        while self._waiting and self._slots:
            request = self._waiting.peek()
            if self._reserved + self._worst_case(request) > self.pool.num_free:
                return  # nobody overtakes, or a large request would wait for ever
            self._waiting.pop()
            self._reserved += self._worst_case(request)
            request.slot = self._slots.pop()
            self._running[request.handle] = request
            self._new_samplers.append(SamplerSetup(request.slot, request.sampling, len(request.prompt)))

    def _worst_case(self, request: Request) -> int:
        """Pages for the prompt and the longest answer; the last token's keys and values are never needed."""
        return self.pool.blocks_for(len(request.prompt) + request.limit - 1)

    def _rows(self) -> Iterator[PlanRow]:
        budget = self.limits.max_step_tokens
        for request in sorted(self._running.values(), key=lambda r: r.num_pending > 1):
            count = self._count(request, budget)
            if count > 0:
                budget -= count
                yield self._row(request, count)

    def _count(self, request: Request, budget: int) -> int:
        """Tokens of `request` to compute within `budget`."""
        if request.num_pending <= budget or not self.limits.whole_blocks:
            return min(request.num_pending, budget)
        return budget - budget % self.pool.block_size

    def _row(self, request: Request, count: int) -> PlanRow:
        end = request.num_computed + count
        self._grow(request, end)
        return PlanRow(
            handle=request.handle,
            slot=request.slot,
            start=request.num_computed,
            token_ids=tuple(request.tokens[request.num_computed : end]),
            num_draft=0,
            block_tables=(BlockTable(FULL, tuple(request.blocks)),),
            adapter_slot=None,
            sampling_slot=request.slot if end == request.num_tokens else None,
        )

    def _grow(self, request: Request, num_tokens: int) -> None:
        """Give `request` the pages for its first `num_tokens` tokens, out of its reservation."""
        missing = self.pool.blocks_for(num_tokens) - len(request.blocks)
        if missing > 0:
            allocation = self.pool.allocate(missing, request.scope)
            request.blocks.extend(allocation.blocks)
            self._dirty.extend(allocation.dirty)
            self._reserved -= missing
