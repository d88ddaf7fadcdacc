"""Crashes: the importer dies at each of its changes of the disk in turn, and the next start finds old or new."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bundles.format.errors import BundleError
from bundles.importer.removal import remove_version
from bundles.importer.steering import Steering, StoppingError
from bundles.importer.workplace import Workplace
from bundles.pipeline import State
from tests.bundles.dying import Died, DyingFs, PowerCutFs
from tests.bundles.making import Trust, make_bundle, split
from tests.bundles.stores import bring, damaged_names, go_on, make_home, open_place, snapshot, spoil, stored


@dataclass(frozen=True)
class Scene:
    """What is about to happen in a home, and what versions there are before and after."""

    home: Path
    act: Callable[[Workplace], object]
    before: tuple[int, ...]
    after: tuple[int, ...]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder whose fsync costs nothing, where there is one; a power cut's losses are the test's."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def _interrupted(place: Workplace, path: Path, at: int) -> None:
    """Import until so many bytes are verified, then cancel."""
    steering = Steering()

    class Watching(list):  # type: ignore[type-arg]  # a list that looks at what it gets
        def append(self, progress: object) -> None:
            if getattr(progress, "bytes_done", 0) >= at:
                steering.end(BundleError("IMPORT_CANCELLED", "enough"))

    assert bring(place, path, Watching(), steering).reason == "IMPORT_CANCELLED"


def _scene(name: str, folder: Path, trust: Trust) -> Scene:
    home = make_home(folder / "home", trust)
    first, second = (make_bundle(folder / f"{n}.bundle", trust, sequence=n) for n in (1, 2))
    place = open_place(home)
    if name != "first import":
        bring(place, first)
    if name == "removal":
        bring(place, second)
    if name == "resumed import":
        _interrupted(place, second, 9000)
        assert place.ledger.stagings()
    if name == "repair":
        spoil(place.store.path_of(str(place.ledger.versions()[0].files[-1]["sha256"])))
    if name == "taken up":
        _left(place, second, trust)
    place.ledger.close()
    return {
        "first import": Scene(home, lambda place: bring(place, first), (), (1,)),
        "next import": Scene(home, lambda place: bring(place, second), (1,), (1, 2)),
        "resumed import": Scene(home, lambda place: bring(place, second), (1,), (1, 2)),
        "taken up": Scene(home, go_on, (1,), (1, 2)),
        "removal": Scene(home, _remove_first, (1, 2), (2,)),
        "repair": Scene(home, lambda place: bring(place, first), (1,), (1,)),
    }[name]


def _left(place: Workplace, path: Path, trust: Trust) -> None:
    """A bundle in volumes, left by a process that stopped when the second was wanted; it lies there now."""
    first = split(path, trust, 5)
    second = first.with_suffix(".002").rename(first.with_name("second"))
    steering = Steering()

    class Stopping(list):  # type: ignore[type-arg]  # a list that looks at what it gets
        def append(self, progress: object) -> None:
            if getattr(progress, "volume_wanted", 0):
                steering.end(StoppingError())

    bring(place, first, Stopping(), steering)
    assert place.ledger.unfinished()
    second.rename(first.with_suffix(".002"))
    first.unlink()


def _remove_first(place: Workplace) -> None:
    if place.ledger.find("tiny@1.0.1") is not None:
        remove_version(place, "tiny@1.0.1")


SCENES = {
    "first import": 9,
    "next import": 11,
    "resumed import": 11,
    "taken up": 11,
    "removal": 1,
    "repair": 9,
}


@pytest.mark.parametrize(
    ("name", "step"),
    [*SCENES.items(), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in SCENES)],
)
def test_dying_at_any_change_of_the_disk_leaves_old_or_new_and_the_next_try_completes_it(
    name: str, step: int, tmp_path: Path, trust: Trust, memory: Path
) -> None:
    """Killed, or with the power cut and all that was not synced gone: by turns, or in a slow run each of both."""
    scene = _scene(name, tmp_path, trust)
    shutil.copytree(scene.home, memory / "whole")
    expected = _complete(memory / "whole", scene)
    ends = []
    for call in range(0, 2000, step):
        cuts = (False, True) if step == 1 else (call % 2 == 0,)
        died = [_round(memory, scene, expected, ends, f"{name}, change {call}", call, cut=cut) for cut in cuts]
        if not all(died):
            break
    else:
        pytest.fail("it never ended")
    print(f"{name}: {call} changes, {len(ends)} crashes")
    assert {scene.before, scene.after} == set(ends), "both sides of the commit were reached"
    assert len(ends) > 5


def _round(
    memory: Path,
    scene: Scene,
    expected: dict[str, bytes],
    ends: list[tuple[int, ...]],
    where: str,
    call: int,
    *,
    cut: bool,
) -> bool:
    """One crash, a look, and the next try; whether there was a crash."""
    work, spare = memory / f"{call}", memory / f"{call}.spare"
    shutil.copytree(scene.home, work)
    spare.mkdir()
    fs = PowerCutFs(spare)
    died = _die(work, scene, fs, call, cut=cut)
    where = f"{where}, {'power cut' if cut else 'killed'}: {fs.calls[-1:]}"
    ends.append(_check(work, scene, where))
    assert _complete(work, scene) == expected, where
    shutil.rmtree(work)
    shutil.rmtree(spare)
    return died


def _die(home: Path, scene: Scene, fs: PowerCutFs, call: int, *, cut: bool) -> bool:
    place = open_place(home, fs)
    fs.arm(call)
    try:
        scene.act(place)
    except Died:
        return True
    else:
        return False
    finally:
        place.ledger.close()
        if cut:
            fs.cut()
        fs.close()


def _check(home: Path, scene: Scene, where: str) -> tuple[int, ...]:
    """What a fresh start finds; the sequences of the versions."""
    place = open_place(home)
    found = tuple(version.sequence for version in place.ledger.versions())
    assert found in (scene.before, scene.after), where
    if "repair" not in where:
        assert damaged_names(place) == [], where
    assert set(stored(place)) <= place.ledger.listed(), where
    records = sorted(int(path.stem) for path in place.store.records())
    assert records == sorted(found), where
    _check_outbox(place, found, where)
    place.ledger.close()
    return found


def _check_outbox(place: Workplace, found: tuple[int, ...], where: str) -> None:
    """Every import went through its states in order, once, to one end; what is there was said to be."""
    states: dict[str, list[State]] = {}
    for entry in place.ledger.outbox(0, limit=1000):
        if entry.state is not None:
            states.setdefault(entry.import_id, []).append(entry.state)
    order = list(State)
    left = {held.import_id for held in place.ledger.unfinished()}
    for import_id, told in states.items():
        assert told == sorted(set(told), key=order.index), where
        ended = [state in (State.COMMITTED, State.REJECTED) for state in told]
        assert ended == [False] * (len(told) - 1) + [import_id not in left], where
    events = Counter(entry.event for entry in place.ledger.outbox(0, limit=1000))
    committed = {
        entry.model_version for entry in place.ledger.outbox(0, limit=1000) if entry.state is State.COMMITTED
    }
    assert {f"tiny@1.0.{sequence}" for sequence in found} <= committed, where
    assert events["removal"] == len(committed) - len(found), where


def _complete(home: Path, scene: Scene) -> dict[str, bytes]:
    """Go on with what was left, then act until it is done; all that is on the disk then."""
    place = open_place(home)
    assert {ended.state for ended in go_on(place)} <= {State.COMMITTED}
    scene.act(place)
    assert place.ledger.unfinished() == ()
    _check_outbox(place, scene.after, "completed")
    assert tuple(version.sequence for version in place.ledger.versions()) == scene.after
    assert damaged_names(place) == []
    assert set(stored(place)) == place.ledger.listed()
    assert place.ledger.stagings() == {}
    place.ledger.close()
    return snapshot(home)


def test_dying_while_a_start_tidies_up_leaves_it_to_the_next_start(
    tmp_path: Path, trust: Trust, memory: Path
) -> None:
    scene = _scene("next import", tmp_path, trust)
    shutil.copytree(scene.home, memory / "whole")
    whole = DyingFs()
    place = open_place(memory / "whole", whole)
    whole.arm(2000)
    scene.act(place)
    place.ledger.close()
    fs = DyingFs()
    place = open_place(scene.home, fs)
    fs.arm(len(whole.calls) - whole.calls[::-1].index("link"))  # all is published, nothing committed
    with pytest.raises(Died):
        scene.act(place)
    place.ledger.close()
    for call in range(200):
        work = memory / str(call)
        shutil.copytree(scene.home, work)
        fs = DyingFs()
        fs.arm(call)
        try:
            open_place(work, fs).ledger.close()
            break
        except Died:
            _check(work, scene, f"start, change {call}")
    assert call > 2


def test_a_repaired_file_and_a_removed_version_are_events_once(tmp_path: Path, trust: Trust) -> None:
    scene = _scene("repair", tmp_path, trust)
    place = open_place(scene.home)
    digest = str(place.ledger.versions()[0].files[-1]["sha256"])
    place.ledger.found(digest, "changed")
    place.ledger.found(digest, "changed")
    scene.act(place)
    scene.act(place)
    remove_version(place, "tiny@1.0.1")
    events = [(e.event, e.detail, e.model_version) for e in place.ledger.outbox(0) if e.event != "import"]
    assert events == [
        ("damage", f"{digest} changed", "tiny@1.0.1"),
        ("repair", digest, "tiny@1.0.1"),
        ("removal", "", "tiny@1.0.1"),
    ]
    place.ledger.close()


def test_killed_for_good_at_a_change_the_next_process_goes_on(tmp_path: Path, trust: Trust, memory: Path) -> None:
    """The same with a real process and SIGKILL, at changes far apart."""
    scene = _scene("next import", tmp_path, trust)
    result = _run("crashing_import.py", scene.home, tmp_path / "2.bundle", memory, "37")
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)
    assert {tuple(outcome["after_crash"]) for outcome in outcomes} == {(1,), (1, 2)}
    assert all(outcome["after_retry"] == [1, 2] and not outcome["damaged"] for outcome in outcomes), outcomes


@pytest.mark.parametrize(
    "call",
    ["fsync:4", *(pytest.param(call, marks=pytest.mark.slow) for call in ("fdatasync:2", "rename:3", "linkat:2"))],
)
def test_killed_inside_a_system_call_the_next_process_goes_on(
    call: str, tmp_path: Path, trust: Trust, memory: Path
) -> None:
    """strace kills the process as it enters the n-th call, those of the database included."""
    name, number = call.split(":")
    inject = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={name}", "-e"]
    inject.append(f"inject={name}:signal=KILL:when={number}")
    if shutil.which("strace") is None or subprocess.run([*inject, "true"], check=False).returncode:
        pytest.skip("strace does not run here")
    scene = _scene("next import", tmp_path, trust)
    shutil.copytree(scene.home, memory / "home")
    result = _run("crashing_import.py", memory / "home", tmp_path / "2.bundle", memory, "0", before=inject)
    assert result.returncode in (-9, 137), result.stderr
    place = open_place(memory / "home")
    assert damaged_names(place) == []
    scene.act(place)
    assert [version.sequence for version in place.ledger.versions()] == [1, 2]
    assert damaged_names(place) == []
    place.ledger.close()


def _run(script: str, *words: object, before: list[str] | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*(before or []), sys.executable, str(Path(__file__).with_name(script)), *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
