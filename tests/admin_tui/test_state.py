"""Events in, a state out: rates, imports, trouble; no terminal and no clock."""

import pytest

from admin_tui.state import (
    Event,
    ImportBegan,
    ImportLost,
    ImportSeen,
    ImportTold,
    ModelsRead,
    State,
    StatusRead,
    TenantsRead,
    Unreached,
    Verified,
    Verifying,
    next_interval,
    reduce,
)
from appliance.protos import admin_pb2
from tests.admin_tui.fake import GONE, START, deployment


def after(*events: Event) -> State:
    state = State()
    for event in events:
        state = reduce(state, event)
    return state


def read(at: float, tokens: int, pid: int = 4242) -> StatusRead:
    found = deployment(tokens=tokens)
    found.worker_pid = pid
    return StatusRead(admin_pb2.GetStatusResponse(deployments=[found]), at, START)


def told(at: float, state: str, done: int = 0, total: int = 0) -> ImportTold:
    return ImportTold(admin_pb2.ImportBundleResponse(state=state, bytes_done=done, bytes_total=total), at)


def test_a_rate_is_the_difference_of_two_readings_over_the_seconds_between_them() -> None:
    assert after(read(0, 100)).tokens_per_second("notes") is None
    assert after(read(0, 100), read(2, 300)).tokens_per_second("notes") == 100


def test_a_rate_forgets_what_is_older_than_its_window() -> None:
    events = [read(float(second), 1000 if second >= 10 else 0) for second in range(20)]
    assert after(*events).tokens_per_second("notes") == 0


def test_a_slow_poll_still_has_a_rate() -> None:
    assert after(read(0, 0), read(60, 600)).tokens_per_second("notes") == 10


@pytest.mark.parametrize(
    "restarted", [read(1, 5, pid=1), read(1, 5)], ids=["another process", "a smaller counter"]
)
def test_a_worker_that_began_anew_has_no_rate_until_it_is_read_twice(restarted: StatusRead) -> None:
    assert after(read(0, 100), restarted).tokens_per_second("notes") is None
    later = read(2, 25, pid=restarted.status.deployments[0].worker_pid)
    assert after(read(0, 100), restarted, later).tokens_per_second("notes") == 20


def test_counters_that_are_not_told_make_no_rate() -> None:
    status = admin_pb2.GetStatusResponse(deployments=[deployment(state="loading")])
    assert after(StatusRead(status, 0, START), StatusRead(status, 1, START)).tokens_per_second("notes") is None


def test_trouble_keeps_what_was_known_and_ends_with_the_next_answer() -> None:
    lost = after(read(0, 100), Unreached(GONE))
    assert lost.trouble is GONE
    assert lost.status is not None
    assert reduce(lost, read(9, 100)).trouble is None
    assert reduce(lost, read(9, 100)).tokens_per_second("notes") is None


def test_an_import_is_rated_from_when_its_bytes_begin_to_move() -> None:
    state = after(
        ImportBegan("/m", 0), told(50, "signed"), told(60, "streaming", 100, 900), told(62, "streaming", 500, 900)
    )
    assert state.importing is not None
    assert state.importing.rate == 200
    assert state.importing.running


@pytest.mark.parametrize("end", [told(1, "committed", 9, 9), told(1, "rejected"), ImportLost(GONE)])
def test_an_import_that_ended_no_longer_runs_and_goes_once_it_was_seen(end: Event) -> None:
    state = after(ImportBegan("/m", 0), end)
    assert state.importing is not None
    assert not state.importing.running
    assert reduce(state, ImportSeen()).importing is None


def test_an_import_out_of_sight_is_shown_again_once_the_next_importer_goes_on_with_it() -> None:
    progress = admin_pb2.ImportBundleResponse(import_id="i1", state="streaming")
    other = admin_pb2.ImportBundleResponse(import_id="i2", state="streaming")
    state = after(ImportBegan("/m", 0), ImportTold(progress, 1), ImportLost(GONE))
    elsewhere = admin_pb2.Import(path="/n", progress=other)
    unknown = reduce(state, ModelsRead((), (), (elsewhere,))).importing
    assert unknown is not None
    assert unknown.lost
    found = reduce(
        state, ModelsRead((), (), (elsewhere, admin_pb2.Import(path="/m", progress=progress)))
    ).importing
    assert found is not None
    assert (found.path, found.elsewhere, found.lost) == ("/m", True, "")
    assert (
        reduce(after(ImportBegan("/m", 0)), ModelsRead((), (), (elsewhere,))).importing
        == after(ImportBegan("/m", 0)).importing
    )


def test_progress_of_nothing_is_no_import() -> None:
    assert after(told(1, "streaming")).importing is None


def test_lists_are_replaced_whole_and_keys_stay_where_they_were_not_asked_for() -> None:
    tenant, key = admin_pb2.Tenant(name="a"), admin_pb2.Key(key_id="k")
    state = after(TenantsRead((tenant,), (key,)), TenantsRead(()), ModelsRead((), ()))
    assert (state.tenants, state.keys, state.versions) == ((), (key,), ())


def test_a_verdict_replaces_the_last_one_as_soon_as_the_next_begins() -> None:
    bad = admin_pb2.VerifyAuditResponse(intact=False)
    state = after(Verifying(), Verified(bad))
    assert (state.verdict, state.verifying) == (bad, False)
    again = reduce(state, Verifying())
    assert (again.verdict, again.verifying) == (None, True)


def test_a_slow_terminal_is_asked_for_less_in_steps_and_for_all_again_when_it_is_not() -> None:
    intervals, interval = [], 1.0
    for drain in (0.1, 0.4, 0.4, 9.0, 0.0, 0.0, 0.0):
        interval = next_interval(interval, drain)
        intervals.append(interval)
    assert intervals == [1.0, 2.0, 4.0, 5.0, 2.5, 1.25, 1.0]
