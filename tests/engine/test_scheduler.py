"""The scheduler: every admitted request gets on in every order of events, and pages are conserved."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool
from engine.plan import ResultRow, StepPlan, StepResult
from engine.request import Request
from engine.scheduler import Limits, Scheduler
from tests.engine.tiny import request

BLOCKS, BLOCK_SIZE, RUNNING, CONTEXT = 12, 4, 3, 60


def scheduler(max_step_tokens: int = 16, max_running: int = RUNNING, **limits: Any) -> Scheduler:
    return Scheduler(BlockPool(BLOCKS, BLOCK_SIZE), Limits(max_step_tokens, max_running, CONTEXT, **limits))


def commit(scheduler: Scheduler, plan: StepPlan, requests: dict[int, Request]) -> None:
    """Carry the plan out: each row that reaches its last token gets one more."""
    rows = tuple(ResultRow(r.handle, (9,) if r.sampling_slot is not None else ()) for r in plan.rows)
    scheduler.commit(plan, StepResult(plan.step, rows))
    for row in rows:
        requests[row.handle].tokens.extend(row.token_ids)


def test_a_prompt_is_cut_into_what_the_step_has_left_after_running_answers() -> None:
    s = scheduler(max_step_tokens=10)
    requests = {i: request(i, [1] * n) for i, n in enumerate([3, 20])}
    s.submit(requests[0])
    plan = s.plan()
    assert plan is not None
    commit(s, plan, requests)
    s.submit(requests[1])
    spans = []
    for _ in range(3):
        plan = s.plan()
        assert plan is not None
        spans.append(
            [(row.handle, row.start, len(row.token_ids), row.sampling_slot is not None) for row in plan.rows]
        )
        commit(s, plan, requests)
    assert spans == [
        [(0, 3, 1, True), (1, 0, 9, False)],
        [(0, 4, 1, True), (1, 9, 9, False)],
        [(0, 5, 1, True), (1, 18, 2, True)],
    ]


def test_with_whole_blocks_prompts_are_cut_only_at_page_borders() -> None:
    s = scheduler(max_step_tokens=11, whole_blocks=True)
    requests = {0: request(0, [1] * 22)}
    s.submit(requests[0])
    counts = []
    while requests[0].num_generated == 0:
        plan = s.plan()
        assert plan is not None
        counts.append(len(plan.rows[0].token_ids))
        commit(s, plan, requests)
    assert counts == [8, 8, 6]


def test_a_request_waits_until_its_prompt_and_some_growth_fit_beside_the_others() -> None:
    s = scheduler(max_step_tokens=64)
    requests = {i: request(i, [1] * n, max_tokens=10) for i, n in enumerate([24, 20, 1])}
    for one in requests.values():
        s.submit(one)
    s.plan()
    assert (s.num_running, s.num_waiting) == (1, 2)  # 6 of 12 pages and one to grow; the next needs 6, and the
    s.remove(requests[0])  # last, which needs 2, does not overtake it
    s.plan()
    assert (s.num_running, s.num_waiting) == (2, 0)


def test_no_more_than_max_running_are_admitted_and_slots_are_distinct() -> None:
    s = scheduler()
    requests = {i: request(i, [1], max_tokens=2) for i in range(5)}
    for one in requests.values():
        s.submit(one)
    plan = s.plan()
    assert plan is not None
    assert sorted(row.slot for row in plan.rows) == [0, 1, 2]
    assert [setup.slot for setup in plan.samplers] == [row.slot for row in plan.rows]


@pytest.mark.parametrize(("step", "running"), [(6, 3), (100, 0)])
def test_a_step_in_which_a_prompt_could_starve_is_refused(step: int, running: int) -> None:
    with pytest.raises(ValueError, match="starve"):
        scheduler(max_step_tokens=step, max_running=running)


def test_pages_are_named_to_be_scrubbed_until_a_step_has_succeeded() -> None:
    s = scheduler(max_step_tokens=64)
    before = request(0, [1] * 40, scope="a")
    s.submit(before)
    assert s.plan() is not None
    s.remove(before)
    named = []
    for handle in (1, 2):
        one = request(handle, [1] * 40, scope="b")
        s.submit(one)
        plan = s.plan()
        assert plan is not None
        named.append(set(plan.scrub))
        s.commit(plan, StepResult(plan.step, ()))
        s.remove(one)
    assert len(named[0]) == 8  # two of its ten pages nobody had before
    assert named[0] <= named[1]


def test_a_smaller_plan_scrubs_what_the_larger_one_did() -> None:
    s = scheduler(max_step_tokens=64)
    before = request(0, [1] * 40, scope="a")
    s.submit(before)
    assert s.plan() is not None
    s.remove(before)
    for handle in (1, 2):
        s.submit(request(handle, [1] * 16, scope="b"))
    plan = s.plan()
    assert plan is not None
    for _ in range(2):  # fewer requests, then less of one
        smaller = s.shrink(plan, 1)
        assert smaller is not None
        assert sum(len(row.token_ids) for row in smaller.rows) < sum(len(row.token_ids) for row in plan.rows)
        assert len(smaller.scrub) == len(plan.scrub) == 6  # two of their eight pages nobody had before
        plan = smaller


def test_who_does_not_fit_is_looked_up_in_the_cache_again_only_when_it_may_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s = scheduler(max_step_tokens=64)
    live = {i: request(i, [i + 1] * 24, max_tokens=10, salt=b"s") for i in range(3)}
    for one in live.values():
        s.submit(one)
    lookups = []
    match = s.pool.match

    def counting(root: bytes, tokens: Sequence[int], limit: int) -> tuple[int, ...]:
        lookups.append(tokens[0])
        return match(root, tokens, limit)

    monkeypatch.setattr(s.pool, "match", counting)
    for _ in range(6):
        plan = s.plan()
        assert plan is not None
        commit(s, plan, live)
    assert lookups == [1, 2, 2]  # refused, and once more when the first one's prompt was computed
    s.remove(live[0])
    s.plan()
    assert lookups == [1, 2, 2, 2, 3]
    assert s.num_running == 1


def test_who_does_not_fit_is_admitted_as_soon_as_another_has_computed_its_prompt() -> None:
    s = scheduler(max_step_tokens=64)
    live = {i: request(i, [1] * 29, max_tokens=4, salt=b"s") for i in range(2)}
    for one in live.values():
        s.submit(one)
    running = []
    for _ in range(2):
        plan = s.plan()
        assert plan is not None
        running.append(s.num_running)
        commit(s, plan, live)
    assert running == [1, 2]
    assert live[1].cached_prompt_tokens == 28


class Machine(RuleBasedStateMachine):
    """Any interleaving of submissions, steps, failed steps and aborts conserves pages and always moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler(max_step_tokens=RUNNING + BLOCK_SIZE, whole_blocks=True)
        self.live: dict[int, Request] = {}
        self.next = 0

    @rule(prompt=st.integers(1, 30), answer=st.integers(1, 20), scope=st.sampled_from("ab"))
    def submit(self, prompt: int, answer: int, scope: str) -> None:
        one = request(self.next, [1] * prompt, max_tokens=min(answer, BLOCKS * BLOCK_SIZE - prompt), scope=scope)
        self.scheduler.submit(one)
        self.live[self.next] = one
        self.next += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(sorted(self.live)))
        self.scheduler.remove(self.live.pop(handle))

    @precondition(lambda self: self.live)
    @rule(fails=st.booleans())
    def step(self, fails: bool) -> None:
        plan = self.scheduler.plan()
        assert plan is not None, "there is work, but no plan"
        assert sum(len(row.token_ids) for row in plan.rows) <= RUNNING + BLOCK_SIZE
        tables = [block for row in plan.rows for table in row.block_tables for block in table.blocks]
        assert len(tables) == len(set(tables))
        for row in plan.rows:
            assert len(row.block_tables[0].blocks) * BLOCK_SIZE >= row.end
        if fails:
            self.scheduler.commit(plan, StepResult(plan.step, ()))
            for row in plan.rows:
                self.scheduler.remove(self.live.pop(row.handle))
            return
        commit(self.scheduler, plan, self.live)
        for one in list(self.live.values()):
            if one.num_generated == one.limit:
                self.scheduler.remove(self.live.pop(one.handle))

    @invariant()
    def pages_are_conserved(self) -> None:
        self.scheduler.check()
        if not self.live:
            assert self.scheduler.pool.num_owned == 0

    def teardown(self) -> None:
        steps = sum(one.limit + len(one.prompt) for one in self.live.values())
        while self.live:
            self.step(fails=False)
            steps -= 1
            assert steps >= 0, "requests do not get on"


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
