"""`cloister bench serve` asks a running appliance as applications do, at the moments that its seed says."""

import json
from itertools import pairwise

import pytest

from appliance.cli.bench_serve import Plan, Seen, summary
from appliance.cli.main import main
from tests.e2e.appliance import ALIAS, Appliance

PLAN = Plan("notes", 1000, 8, 4, seed=3, timeout=10.0, first_s=0.5, between_s=0.1)


def test_the_same_seed_asks_at_the_same_moments_and_at_the_rate_on_average() -> None:
    moments = list(PLAN.arrivals(5.0))
    assert moments == list(PLAN.arrivals(5.0)) != list(PLAN.arrivals(6.0))
    gaps = [after - before for before, after in pairwise(moments)]
    assert min(gaps) > 0
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 5.0, rel=0.1)


def test_goodput_counts_requests_that_were_soon_begun_and_steadily_answered() -> None:
    good = Seen(1.0, [1.4, 1.45, 1.5], 3)
    late = Seen(1.0, [1.6, 1.7, 1.8], 3)  # counted from when it was due, whenever it was sent
    slow = Seen(1.0, [1.1, 1.5, 2.0], 3)
    refused = Seen(1.0, code="QUOTA_EXCEEDED")
    found = summary(PLAN, 2.0, [good, late, slow, refused])
    assert (found["answered"], found["failed"], found["goodput"]) == (3, {"QUOTA_EXCEEDED": 1}, 1 / 2.0)
    assert found["first_ms"]["p50"] == pytest.approx(400.0)
    assert found["between_ms"]["p99"] == pytest.approx(500.0)
    assert found["tokens_per_second"] == 9 / 2.0


def test_a_rate_at_which_nothing_was_answered_has_no_times() -> None:
    found = summary(PLAN, 2.0, [Seen(1.0, code="UNAVAILABLE")])
    assert (found["goodput"], found["first_ms"]["p50"], found["requests_per_second"]) == (0.0, None, 0.0)


def test_a_running_appliance_is_measured_at_each_rate(
    appliance: Appliance, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--rate", "50,100", "--requests", "6", "--prompt", "8", "--answer", "4"]
    assert main(["bench", "serve", ALIAS, "--credentials", str(appliance.credentials), *words]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["rate"], row["answered"], row["failed"]) for row in rows] == [(50.0, 6, {}), (100.0, 6, {})]
    facts = [record["body"]["facts"] for record in appliance.records() if record["phase"] == "outcome"][-12:]
    assert [(told["prompt_tokens"], told["completion_tokens"]) for told in facts] == 12 * [(8, 4)]


def test_rates_that_are_none_are_bad_usage() -> None:
    for rates in ("0", "", "1,x", "-1"):
        with pytest.raises(SystemExit) as left:
            main(["bench", "serve", ALIAS, f"--rate={rates}"])
        assert left.value.code == 2
