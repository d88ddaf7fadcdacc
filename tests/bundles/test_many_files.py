"""What an appliance does with a version costs as much per file whether it has few of them or many."""

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundles.format import manifest as manifests
from bundles.importer import views
from bundles.importer.ledger import Ledger
from bundles.importer.records import ModelVersion
from bundles.importer.removal import remove_version
from bundles.importer.scrubbing import Pace, Scrubber
from bundles.pipeline import State
from tests.bundles.making import Trust, make_bundle
from tests.bundles.stores import bring, make_home, open_place


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the costly things were done: each of them reads all that is known of all files."""
    counted: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def call(*words: Any) -> Any:
            counted[name] += 1
            return real(*words)

        monkeypatch.setattr(owner, name, call)

    count(ModelVersion, "from_json")
    for name in ("versions", "listed", "damaged"):
        count(Ledger, name)
    return counted


def _files(count: int) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        for i in range(count):
            (model / f"{i}.txt").write_text(f"file {i}")

    return write


def _life(home: Path, bundle: Path, trust: Trust, calls: Counter[str]) -> dict[str, Counter[str]]:
    """A version is imported, lost to the disk, found lost, shown, brought again, removed; the calls of each."""
    place, made = open_place(make_home(home, trust)), {}
    calls.clear()

    def step(name: str, act: Callable[[], object]) -> None:
        act()
        made[name] = calls.copy()
        calls.clear()

    def lose() -> None:
        for path in place.store.root.glob("sha256/*/*"):
            path.unlink()

    step("imported", lambda: bring(place, bundle))
    step("lost", lose)
    step("scrubbed", Scrubber(place, Pace(0, 0), lambda: 0.0, lambda _: None).scrub)
    step("shown", lambda: views.store_view(place))
    assert len(views.store_view(place).damaged) == len(set(place.ledger.versions()[0].digests()))
    calls.clear()
    step("brought again", lambda: bring(place, bundle))
    assert not place.ledger.damaged()
    events = Counter(entry.event for entry in place.ledger.outbox(0, 10_000))
    assert events["damage"] == events["repair"] == len(place.ledger.listed())
    calls.clear()
    step("scrubbed again", Scrubber(place, Pace(0, 0), lambda: 0.0, lambda _: None).scrub)
    step("removed", lambda: remove_version(place, "tiny@1.0.1"))
    assert [e.state for e in place.ledger.outbox(0, 10_000) if e.state][-1] is State.COMMITTED
    place.ledger.close()
    return made


def test_no_record_is_read_for_each_of_its_files(tmp_path: Path, trust: Trust, calls: Counter[str]) -> None:
    lives = []
    for count in (3, 60):
        bundle = make_bundle(tmp_path / f"{count}.bundle", trust, prepare=_files(count))
        lives.append(_life(tmp_path / f"{count}", bundle, trust, calls))
    assert lives[0] == lives[1]
    assert sum(lives[1]["scrubbed"].values()) < 10


def test_a_manifest_is_parsed_once_while_somebody_holds_it(
    tmp_path: Path, trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import verifies its head twice, the second time under the trust of its end."""
    bundle = make_bundle(tmp_path / "b", trust, sequence=77)
    before = set(manifests._HELD)
    parsed: list[int] = []
    real = manifests._parse
    monkeypatch.setattr(manifests, "_parse", lambda raw: parsed.append(len(raw)) or real(raw))
    place = open_place(make_home(tmp_path / "home", trust))
    bring(place, bundle)
    assert len(parsed) == 1
    gc.collect()
    assert set(manifests._HELD) <= before, "nothing of it stays"
    place.ledger.close()
