"""A new version's way in, through every real process: imported, tried by its canaries, active; or as it was."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.appliance import DEMO_MODEL, Appliance, build_bundle, eventually

WARD = "ward-trial"
pytestmark = pytest.mark.timeout(600)  # models are loaded, on a machine that may be busy


@pytest.fixture(scope="module")
def folder(appliance: Appliance) -> Iterator[Path]:
    """Where bundles are built, with the keys that the appliance trusts."""
    path = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    shutil.copytree(appliance.keys, path / "keys")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def versions(appliance: Appliance, folder: Path) -> Iterator[dict[str, str]]:
    """Two more versions: `good` with the demo model's own canaries, and `bad`, which expects another answer."""
    spoilt = shutil.copytree(DEMO_MODEL, folder / "spoilt")
    canaries = json.loads((spoilt / "canaries.json").read_text())
    canaries["canaries"] = [{**canaries["canaries"][0], "match": "json", "expected": '{"nothing": "of the kind"}'}]
    (spoilt / "canaries.json").write_text(json.dumps(canaries))
    bundles = {"good": build_bundle(folder, sequence=2), "bad": build_bundle(folder, spoilt, sequence=3)}
    for bundle in bundles.values():
        appliance.cloister("bundle", "import", str(bundle))
    yield {"good": "demo-notes-s@1.0.2", "bad": "demo-notes-s@1.0.3"}
    appliance.cloister("alias", "remove", WARD)
    appliance.cloister("tenant", "set", "ward-notes", "--models", "notes")
    for deployment in appliance.json("model", "list"):
        if deployment["name"] != "notes":
            appliance.cloister("model", "unload", deployment["name"])
    for version in ("demo-notes-s@1.0.2", "demo-notes-s@1.0.3"):
        appliance.cloister("bundle", "remove", version)


def states(appliance: Appliance) -> dict[str, str]:
    return {f"{v['name']}@{v['version']}": v["state"] for v in appliance.json("bundle", "list")}


def steps(printed: str) -> list[str]:
    return [json.loads(line)["stage"] for line in printed.splitlines()]


def test_a_version_goes_behind_an_alias_a_failing_one_does_not_and_the_way_back_is_one_command(
    appliance: Appliance, versions: dict[str, str], folder: Path
) -> None:
    appliance.cloister("alias", "set", WARD, "notes")
    appliance.cloister("tenant", "set", "ward-notes", "--models", f"notes,{WARD}")

    second = appliance.cloister("--json", "model", "activate", versions["good"], "--alias", WARD).stdout
    assert steps(second)[-2:] == ["switched", "active"]
    assert json.loads(second.splitlines()[-1])["canaries_passed"] > 0
    found = states(appliance)
    assert (found["demo-notes-s@1.0.1"], found[versions["good"]]) == ("active", "active"), (
        "two aliases, two versions"
    )

    failed = appliance.cloister("model", "activate", versions["bad"], "--alias", WARD, expect=3)
    assert "error: CANARY_FAILED" in failed.stderr
    assert f"{WARD} is where it was" in failed.stderr
    aliases = {a["name"]: a["deployment"] for a in appliance.json("alias", "list")}
    assert aliases[WARD] == f"{WARD}-2"
    eventually(lambda: f"{WARD}-3" not in {d["name"] for d in appliance.status()["deployments"]}, "unloaded")

    back = appliance.cloister("--json", "model", "rollback", WARD).stdout
    assert steps(back)[-1] == "active"
    aliases = {a["name"]: a["deployment"] for a in appliance.json("alias", "list")}
    assert aliases[WARD] == "notes", "what is still loaded answers again at once"
    with appliance.client() as client:
        assert client.generate(WARD, "hello", max_tokens=2).result().completed.usage.completion_tokens > 0


def test_what_the_canaries_did_is_on_record_and_holds_no_text_of_theirs(
    appliance: Appliance, versions: dict[str, str]
) -> None:
    records = appliance.records()
    asked = [r for r in records if r["kind"] == "inference.request" and r["tenant"] == "system"]
    assert {r["phase"] for r in asked} == {"intent", "outcome"}
    ends = [r["body"]["facts"] for r in records if r["kind"] == "model.activation"]
    returned = next(facts for facts in ends if facts["reason"] == "CANARY_FAILED")
    assert returned["canaries_failed"] == {"0": "MISMATCH"}
    assert "of the kind" not in json.dumps(records)


def test_a_version_in_use_stays_and_one_that_nothing_runs_goes(appliance: Appliance, folder: Path) -> None:
    refused = appliance.cloister("bundle", "remove", "demo-notes-s@1.0.1", expect=3)
    assert "error: VERSION_IN_USE" in refused.stderr
    before = appliance.json("bundle", "store")
    bundle = build_bundle(folder, sequence=4)
    appliance.cloister("bundle", "import", str(bundle))
    grown = appliance.json("bundle", "store")
    assert grown["listed_bytes"] > before["listed_bytes"]
    added = grown["bytes"] - before["bytes"]
    assert added < before["bytes"] // 50, "the model's files were there already; a release adds its documents"
    appliance.cloister("bundle", "remove", "demo-notes-s@1.0.4")
    assert appliance.json("bundle", "store")["listed_bytes"] == before["listed_bytes"]
    assert "demo-notes-s@1.0.4" not in states(appliance)


def test_a_scrub_finds_the_store_as_it_was_imported(appliance: Appliance) -> None:
    assert appliance.json("bundle", "scrub")["ended"] is True
    assert appliance.json("bundle", "store")["damaged"] == []
