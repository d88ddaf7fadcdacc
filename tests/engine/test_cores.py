"""Cores: how many there are, which each deployment gets, and that the real processes keep to theirs."""

import os
from pathlib import Path

import pytest

from engine.cores import Core, engine_cores, numbers, physical_cores, usable_cores
from engine.host.core_map import CoreMap
from engine.host.places import Places, own_cores
from engine.protos import engine_pb2
from tests.engine.test_host import READY, Host, children, deployment, host  # noqa: F401  # a fixture

EIGHT = tuple((number, number + 8) for number in range(8))


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two hardware threads each, of which this process may use all but 0 and 7."""
    for number in range(8):
        (tmp_path / f"cpu{number}" / "topology").mkdir(parents=True)
        siblings = f"{number % 4},{number % 4 + 4}\n"
        (tmp_path / f"cpu{number}" / "topology" / "thread_siblings_list").write_text(siblings)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(1, 7)))
    return tmp_path


def test_hardware_threads_of_a_core_count_once_and_those_not_allowed_not_at_all(system: Path) -> None:
    assert physical_cores(system) == ((1, 5), (2, 6), (3,), (4,))
    assert usable_cores(system / "none", system / "none", system) == 4


def test_without_a_topology_each_hardware_thread_is_a_core(system: Path) -> None:
    assert physical_cores(system / "none") == ((1,), (2,), (3,), (4,), (5,), (6,))


@pytest.mark.parametrize(("text", "found"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("\n", set())])
def test_the_kernels_lists_are_read(text: str, found: set[int]) -> None:
    assert numbers(text) == found


@pytest.mark.parametrize(("cores", "of_engine"), [(1, 1), (2, 1), (4, 3), (8, 7), (16, 14), (64, 56)])
def test_an_eighth_of_the_cores_and_one_at_least_is_for_other_processes(cores: int, of_engine: int) -> None:
    assert engine_cores(cores) == of_engine


@pytest.mark.parametrize(
    ("cores", "threads", "taken", "left"),
    [
        (((0,),), 1, (0,), {0}),  # nothing is left: all run on all
        (((0,), (1,)), 1, (1,), {0}),
        (((0,), (1,)), 2, (0, 1), {0, 1}),
        (((0,), (1,)), 3, (), {0, 1}),  # more than there are: they run where they like
        (EIGHT, 3, (1, 2, 3), {0, 8, 4, 12, 5, 13, 6, 14, 7, 15}),  # nobody else on the siblings of what is taken
        (EIGHT, 7, (1, 2, 3, 4, 5, 6, 7), {0, 8}),
        (EIGHT, 8, tuple(range(8)), set(range(8, 16))),  # the siblings, as no core is left
        (EIGHT, 10, tuple(range(10)), set(range(10, 16))),
    ],
)
def test_a_thread_gets_a_core_of_its_own_and_the_others_get_the_rest(
    cores: tuple[Core, ...], threads: int, taken: tuple[int, ...], left: set[int]
) -> None:
    places = CoreMap(cores)
    assert places.take("notes", threads) == taken
    assert places.left == left
    places.give_back("notes")
    assert places.left == {number for core in cores for number in core}


def test_deployments_get_cores_that_fewest_have_and_leave_one_where_they_can() -> None:
    places = CoreMap(EIGHT)
    assert (places.take("a", 3), places.take("b", 3)) == ((1, 2, 3), (4, 5, 6))
    assert places.take("c", 3) == (1, 2, 7)
    assert places.left == {0, 8}
    places.give_back("a")
    assert places.take("d", 2) == (1, 3)


def test_under_a_quota_nobody_has_a_core_to_himself(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[frozenset[int]] = []
    monkeypatch.setattr("engine.host.places.physical_cores", lambda: EIGHT)
    monkeypatch.setattr("engine.host.places.quota_cores", lambda: 7)
    places = Places(own_cores(), told.append)
    assert places.take(engine_pb2.Deployment(name="a", options={"threads": 2})) == ()  # type: ignore[arg-type]  # a dict becomes the message
    places.settle({"a": (os.getpid(), 0)})
    assert told == []
    monkeypatch.setattr("engine.host.places.quota_cores", lambda: 8)
    assert own_cores() == EIGHT


@pytest.mark.skipif(len(physical_cores()) < 2, reason="one core has nothing to tell apart")
async def test_a_workers_threads_keep_to_its_cores_and_everybody_else_off_them(
    host: Host,  # noqa: F811
    tiny_store: tuple[Path, engine_pb2.FileSet],
) -> None:
    cores = physical_cores()
    expected = CoreMap(cores)
    team, everybody = set(expected.take("notes", 1)), expected.left
    await host.want(deployment(tiny_store[1], threads=1))
    ready = await host.state("notes", READY)
    worker = threads(ready.worker_pid)
    assert worker[ready.worker_pid] == everybody
    assert set(worker.values()) == {frozenset(team), everybody}
    for pid in (host.running.process.pid, children(host.running.process.pid)["engine.text"]):
        assert set(threads(pid).values()) == {everybody}

    await host.want()
    await host.until(lambda now: now == {})
    assert set(threads(host.running.process.pid).values()) == {
        frozenset(number for core in cores for number in core)
    }


def threads(pid: int) -> dict[int, frozenset[int]]:
    """Where each thread of a process may run, by its id."""
    found = map(int, os.listdir(f"/proc/{pid}/task"))
    return {thread: frozenset(os.sched_getaffinity(thread)) for thread in found}
