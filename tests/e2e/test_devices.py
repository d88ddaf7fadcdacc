"""Devices and plans against the running appliance: what is planned is held, and what cannot be is never made."""

import json

from tests.e2e.appliance import ALIAS, Appliance


def test_a_plan_is_what_the_worker_then_holds(appliance: Appliance) -> None:
    answer = appliance.json("gpu", "plan", "demo-notes-s", "--deterministic")
    plan = answer["plan"]
    parts = ("weights_bytes", "kv_bytes", "activation_bytes", "loading_bytes", "process_bytes")
    assert sum(plan[part] for part in parts) == plan["total_bytes"] <= plan["available_bytes"]
    engine = appliance.deployment(ALIAS)["engine"]
    assert engine["blocks_total"] == plan["options"]["kv_blocks"]
    spare = plan["options"]["backend"] == "torch"  # a page that stays zero
    assert plan["kv_bytes"] == (engine["blocks_total"] + spare) * plan["kv_block_bytes"]
    shown = appliance.cloister("gpu", "plan", "demo-notes-s").stdout
    assert "fits" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_cpu_is_listed_with_what_runs_on_it(appliance: Appliance) -> None:
    found = appliance.json("gpu", "list")
    assert (found["devices"][0]["id"], found["recorded_from"]) == ("cpu", "")
    assert ALIAS in found["devices"][0]["deployments"]
    assert "available of" in appliance.cloister("gpu", "list").stdout


def test_a_load_that_cannot_fit_is_refused_with_numbers_and_leaves_no_deployment(appliance: Appliance) -> None:
    options = ("--kv-blocks", "16000000", "--block-size", "1024", "--max-step-tokens", "2048")
    refused = appliance.cloister("model", "load", "demo-notes-s", "--as", "absurd", *options, expect=3).stderr
    assert refused.startswith("error: OUT_OF_MEMORY: needs ")
    assert "lower kv_blocks (now 16000000)" in refused
    assert "absurd" not in [deployment["name"] for deployment in appliance.status()["deployments"]]
    planned = appliance.cloister("gpu", "plan", "demo-notes-s", *options, expect=3)
    assert "DOES NOT FIT" in planned.stdout
    assert planned.stderr.startswith("error: OUT_OF_MEMORY: needs ")


def test_the_log_is_queried_newest_first(appliance: Appliance) -> None:
    words = ("audit", "query", "--kind", "operator.change", "--decision", "done", "-n", "3")
    lines = appliance.cloister("--json", *words).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert [record["decision"] for record in found] == ["done"] * 3
    numbers = [record["sequence"] for record in found]
    assert numbers == sorted(numbers, reverse=True)
    older = appliance.cloister("--json", *words, "--before", str(numbers[-1])).stdout.splitlines()
    assert all(json.loads(line)["sequence"] < numbers[-1] for line in older)
    assert appliance.cloister("audit", "query", "--until", "90d").stdout == ""
