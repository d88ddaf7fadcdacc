"""Fair shares: tokens of scopes that wait stand in the ratio of their weights, whatever each of them queues."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from engine.block_pool import BlockPool
from engine.fair_queue import FairQueue
from engine.plan import ResultRow, StepResult
from engine.request import Request, SamplingParams, StopCriteria
from engine.scheduler import Limits, Scheduler
from tests.engine.tiny import engine, run, save_llama


class House:
    """A scheduler without a model: every row that reaches its last token gets one more."""

    def __init__(self, running: int = 4) -> None:
        self.scheduler = Scheduler(BlockPool(400, 4), Limits(64, running, 200))
        self.live: dict[int, Request] = {}
        self.tokens: Counter[str] = Counter()
        self.ended: list[str] = []

    def queue(self, scope: str, count: int, prompt: int = 6, answer: int = 10, weight: int = 1) -> None:
        for _ in range(count):
            handle = len(self.live) + len(self.ended)
            self.live[handle] = Request(
                handle, [1] * prompt, SamplingParams(), StopCriteria(answer), scope, weight=weight
            )
            self.scheduler.submit(self.live[handle])

    def step(self) -> None:
        plan = self.scheduler.plan()
        assert plan is not None
        rows = tuple(ResultRow(r.handle, (9,) if r.sampling_slot is not None else ()) for r in plan.rows)
        self.scheduler.commit(plan, StepResult(plan.step, rows))
        for planned, row in zip(plan.rows, rows, strict=True):
            one = self.live[row.handle]
            one.tokens.extend(row.token_ids)
            prompt = len(one.prompt)
            self.tokens[one.scope] += min(planned.end, prompt) - min(planned.start, prompt) + len(row.token_ids)
            if one.num_generated == one.limit:
                self.scheduler.remove(one)
                self.ended.append(one.scope)

    def steps(self, count: int) -> Counter[str]:
        """Prompt and generated tokens per scope in the next `count` steps."""
        before = self.tokens.copy()
        for _ in range(count):
            self.step()
        return self.tokens - before


def order(queue: FairQueue) -> Iterator[int]:
    while queue:
        yield queue.pop().handle


def pushed(requests: Iterable[Request]) -> FairQueue:
    queue = FairQueue()
    for one in requests:
        queue.push(one)
    return queue


def waiting(handle: int, scope: str, tokens: int = 4, weight: int = 1) -> Request:
    return Request(handle, [1] * tokens, SamplingParams(), StopCriteria(1), scope, weight=weight)


def test_a_scope_that_queues_a_thousand_requests_leaves_another_its_half() -> None:
    house = House()
    house.queue("greedy", 1000)
    house.steps(20)
    house.queue("modest", 100)
    house.steps(20)
    tokens = house.steps(200)
    assert tokens["modest"] == pytest.approx(tokens["greedy"], rel=0.1)


def test_short_and_long_requests_share_tokens_not_requests() -> None:
    house = House()
    house.queue("long", 300, prompt=40, answer=30)
    house.queue("short", 900, prompt=4, answer=4)
    tokens = house.steps(1000)
    assert tokens["short"] == pytest.approx(tokens["long"], rel=0.1)


def test_tokens_stand_in_the_ratio_of_the_weights() -> None:
    house = House()
    house.queue("one", 400, weight=1)
    house.queue("three", 400, weight=3)
    tokens = house.steps(400)
    assert tokens["three"] / tokens["one"] == pytest.approx(3, rel=0.1)


def test_who_was_idle_has_saved_nothing_up() -> None:
    house = House()
    house.queue("busy", 500)
    house.queue("burst", 1)
    house.steps(200)
    house.queue("burst", 300)
    tokens = house.steps(100)
    assert tokens["burst"] == pytest.approx(tokens["busy"], rel=0.15)


def test_a_newcomer_is_not_owed_what_a_lone_scope_generated_while_nothing_waited() -> None:
    house = House()
    house.queue("alone", 4, answer=150)
    house.steps(140)
    house.queue("newcomer", 300)
    house.queue("alone", 300)
    tokens = house.steps(200)
    assert tokens["newcomer"] == pytest.approx(tokens["alone"], rel=0.15)


def test_who_came_back_has_not_shed_what_it_took() -> None:
    queue = pushed([waiting(0, "a", tokens=100), *(waiting(i, "b", tokens=10) for i in (1, 2, 3))])
    assert queue.pop().handle == 0
    queue.push(waiting(4, "a"))
    assert list(order(queue)) == [1, 2, 3, 4]


def test_within_a_scope_the_first_to_come_is_the_first_served() -> None:
    assert list(order(pushed(waiting(i, "a", tokens=9 - i) for i in range(8)))) == list(range(8))


def test_scopes_that_are_level_go_in_order_of_arrival() -> None:
    assert list(order(pushed(waiting(i, "cab"[i]) for i in range(3)))) == [0, 1, 2]


def test_a_request_that_is_withdrawn_costs_nothing() -> None:
    requests = [waiting(0, "a", tokens=100), waiting(1, "a"), waiting(2, "b")]
    queue = pushed(requests)
    queue.remove(requests[0])
    assert list(order(queue)) == [1, 2]
    with pytest.raises(ValueError, match="not in"):
        queue.remove(requests[0])


def test_what_the_cache_spared_is_not_charged() -> None:
    queue = pushed([waiting(0, "a", tokens=100), waiting(1, "b", tokens=50), waiting(2, "a"), waiting(3, "b")])
    assert queue.pop(cached=90).handle == 0
    assert queue.pop().handle == 1
    assert queue.peek().handle == 2
    assert queue.furthest_ahead("ab") == "b"


def test_who_gave_up_its_pages_comes_next_in_its_scope_and_costs_nothing_again() -> None:
    queue = pushed([waiting(0, "a", tokens=10), waiting(1, "a", tokens=10), waiting(2, "b", tokens=15)])
    first = queue.pop()
    first.preemptions += 1
    assert queue.pop().handle == 2
    queue.restore(first)
    assert list(order(queue)) == [0, 1]
    assert queue.furthest_ahead("ab") == "a"


def test_a_lone_scope_is_served_as_from_a_plain_queue() -> None:
    house = House(running=2)
    house.queue("a", 10, weight=7)
    handles = []
    while house.scheduler.num_waiting or house.scheduler.num_running:
        plan = house.scheduler.plan()
        assert plan is not None
        handles.extend(row.handle for row in plan.rows if row.start == 0)
        house.step()
    assert handles == list(range(10))


def test_greedy_answers_do_not_depend_on_scopes_and_weights(tmp_path: Path) -> None:
    save_llama(tmp_path)
    answers = []
    for scopes, weight in (("a", 1), ("abc", 1), ("ab", 5)):
        loop = engine(tmp_path, max_running=3, deterministic=True)
        for i in range(9):
            stop = StopCriteria(6, ignore_eos=True)
            scope = scopes[i % len(scopes)]
            loop.submit(
                Request(
                    i, range(2 + i, 20 + i), SamplingParams(), stop, scope, weight=1 if scope == "a" else weight
                )
            )
        answers.append({handle: answer.token_ids for handle, answer in run(loop).items()})
    assert answers[0] == answers[1] == answers[2]
