"""Every refusal of the threat model, by its number: the code, nothing written, nothing changed, little read."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from bundles.content.files import FolderFiles
from bundles.content.inspector import Inspector
from bundles.content.judge import judge
from bundles.format.errors import BundleError
from bundles.importer.importing import import_bundle
from bundles.importer.steering import Steering
from bundles.importer.workplace import Workplace
from bundles.pipeline import Progress, State
from bundles.trust import roots
from bundles.verify import verify
from tests.bundles.attacks import Attack, Refusal, Scene
from tests.bundles.forging import Draft
from tests.bundles.hostile import REFUSALS, SHARED, make_drafts, make_model
from tests.bundles.making import INSPECTOR, sha256
from tests.bundles.reading import Medium, changes


@dataclass(frozen=True)
class House:
    """An appliance that holds release 5, and a good release 6 to forge from."""

    home: Path
    good: Draft
    base: Draft
    model: Path


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    """In memory where there is such a folder: nothing here is about a disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        root = Path(folder)
        model = make_model(root / "model")
        good, base = make_drafts(model)
        made = House(root / "home", good, base, model)
        (made.home / "trust").mkdir(parents=True)
        (made.home / "trust" / "1.root.json").write_bytes(good["trust/1.root.json"])
        (made.home / "trust" / "site").write_text("here\n")
        place = Workplace.open(made.home, INSPECTOR)
        first = Scene(root, made.good, made.base, model).write(made.base)
        ended = import_bundle(place, "first", first, lambda _: None)
        place.ledger.acknowledge(99)
        place.ledger.close()
        assert ended.state is State.COMMITTED, ended
        yield made


@pytest.fixture
def scene(house: House) -> Iterator[Scene]:
    folder = Path(tempfile.mkdtemp(dir=house.home.parent))
    yield Scene(folder, house.good, house.base, house.model)
    shutil.rmtree(folder)


@pytest.fixture
def place(house: House) -> Iterator[Workplace]:
    """The appliance, as it was before any attack."""
    folder = Path(tempfile.mkdtemp(dir=house.home.parent))
    place = Workplace.open(Path(shutil.copytree(house.home, folder / "home")), INSPECTOR)
    yield place
    place.ledger.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def standing(house: House) -> Iterator[Workplace]:
    """The appliance, for what changes nothing of it."""
    place = Workplace.open(house.home, INSPECTOR)
    yield place
    place.ledger.close()


def _content(folder: Path) -> dict[str, tuple[int, str]]:
    """Mode and digest of everything in a folder, without the ledger, which records each import."""
    found = (path for path in sorted(folder.rglob("*")) if not path.name.startswith("store.db"))
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, sha256(path.read_bytes()) if path.is_file() else "")
        for path in found
    }


def _outside_staging(home: Path) -> dict[str, tuple[int, str]]:
    return {name: what for name, what in _content(home).items() if not name.startswith("store/staging/")}


def _harmless(staging: Path) -> bool:
    """Plain files that no one can run, and folders, in a folder of the importer's own."""
    return all(
        path.is_dir() or (path.is_file() and not path.is_symlink() and not path.stat().st_mode & 0o7133)
        for path in staging.rglob("*")
    )


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: f"{refusal.number:02} {refusal.name}")
def test_the_attack_is_refused_by_its_code_and_leaves_nothing(
    place: Workplace, scene: Scene, refusal: Refusal
) -> None:
    attack = refusal.prepare(scene)
    home = place.trust.parent
    before, versions = _outside_staging(home), place.ledger.versions()
    with attack.around, Medium(scene.folder) as medium, changes() as changed:
        code, message = _verified(attack, scene) if attack.verified else _imported(attack, place)
    assert code == refusal.code, message
    assert message
    staging = home / "store" / "staging"
    ours = (staging, scene.folder)
    assert [path for path in changed if path.is_absolute() and not any(map(path.is_relative_to, ours))] == []
    assert [path for path in changed if not path.is_absolute() and len(path.parts) > 1] == []
    assert _outside_staging(home) == before
    assert place.ledger.versions() == versions
    assert _harmless(staging)
    if refusal.early:
        assert medium.bytes_read <= _before_chunks(attack.source)


def _imported(attack: Attack, place: Workplace) -> tuple[str, str]:
    """How the import ends, and what the outbox has of it."""
    steering, offers = Steering(), iter(attack.volumes)

    def watch(progress: Progress) -> None:
        attack.watch(progress)
        if progress.volume_wanted:
            try:
                steering.offer(next(offers))
            except BundleError as error:
                steering.end(error)

    ended = import_bundle(attack.site(place), "attack", attack.source, watch, steering)
    last = place.ledger.outbox(0)[-1]
    assert (ended.state, last.state, last.reason) == (State.REJECTED, State.REJECTED, ended.reason)
    return ended.reason, ended.message


def _verified(attack: Attack, scene: Scene) -> tuple[str, str]:
    root = roots.parse(scene.good["trust/1.root.json"])
    with pytest.raises(BundleError) as refused:
        verify(attack.source, root, site=attack.verified, inspector=INSPECTOR)
    return refused.value.code, refused.value.message


# What only an appliance knows: the room that its store has, and the volumes that somebody brings to it.
OF_THE_STORE = frozenset({"STORE_SPACE", "STORE_QUOTA"})


@pytest.mark.parametrize(
    "refusal",
    [refusal for refusal in REFUSALS if refusal.code not in OF_THE_STORE],
    ids=lambda refusal: f"{refusal.number:02} {refusal.name}",
)
def test_verify_comes_to_the_verdict_of_an_import(standing: Workplace, scene: Scene, refusal: Refusal) -> None:
    attack = refusal.prepare(scene)
    if attack.volumes:
        return
    place = attack.site(standing)
    revocations = place.revocations()
    with attack.around, pytest.raises(BundleError) as refused:
        verify(
            attack.source,
            place.pinned(),
            site=attack.verified or place.site(place.now(), revocations),
            inspector=place.inspector,
            report=attack.watch,
            revocations=revocations,
        )
    assert refused.value.code == refusal.code, refused.value.message


def _before_chunks(source: Path) -> int:
    """Bytes up to the first chunk's content, its header included; all where there is no chunk."""
    if source.is_dir():
        rest = (path for path in source.rglob("*") if path.is_file() and path.parent.name != "c")
        return sum(path.stat().st_size for path in rest)
    raw, at = source.read_bytes(), 0
    while at + 512 <= len(raw):
        if raw[at : at + 2] == b"c/":
            return at + 512
        size = raw[at + 124 : at + 135]
        at += 512 - (-int(size, 8) // 512) * 512 if size.isdigit() else len(raw)
    return len(raw)


@pytest.mark.parametrize("form", ["file", "folder", "volumes"])
def test_the_good_bundle_is_read_whole_and_committed(place: Workplace, scene: Scene, form: str) -> None:
    """What the attacks are forged from is refused for nothing, and the count of bytes sees every read."""
    attack = _good(scene, form)
    with Medium(scene.folder) as medium, changes() as changed:
        ended = import_bundle(place, "good", attack, lambda _: None)
    assert ended.state is State.COMMITTED, ended
    assert medium.bytes_read >= sum(path.stat().st_size for path in scene.folder.rglob("*") if path.is_file())
    assert [path for path in changed if path.is_relative_to(place.store.root / "sha256")]
    assert [version.sequence for version in place.ledger.versions()] == [5, 6]


def _good(scene: Scene, form: str) -> Path:
    if form == "folder":
        return scene.write_folder(scene.good)
    if form == "volumes":
        first, _ = (scene.write(volume, f"b.00{n}") for n, volume in enumerate(scene.good.split(), 1))
        return first
    return scene.write(scene.good)


def test_the_model_of_the_good_bundle_is_one_that_the_engine_runs(scene: Scene) -> None:
    sizes = {path.name: path.stat().st_size for path in scene.model.iterdir()}
    files = FolderFiles(os.open(scene.model, os.O_RDONLY), {name: name for name in sizes}, sizes)
    with closing(files):
        assert judge(files, Inspector(), "model").capabilities == ("generate", "chat")


def test_the_list_is_complete_and_every_variant_has_a_name() -> None:
    assert {refusal.number for refusal in REFUSALS} == set(range(1, 85))
    names = [(refusal.number, refusal.name) for refusal in REFUSALS]
    assert len(set(names)) == len(names)


def test_a_code_belongs_to_one_number_unless_two_are_one_fault() -> None:
    numbers: dict[str, set[int]] = {}
    for refusal in REFUSALS:
        numbers.setdefault(refusal.code, set()).add(refusal.number)
    shared = {code: {home, guest} for code, (home, guest, _) in SHARED.items()}
    assert {code: found for code, found in numbers.items() if len(found) > 1} == shared
    homes = {SHARED[code][0] if code in SHARED else min(found) for code, found in numbers.items()}
    assert homes == set(range(1, 85)), "every number has a code of its own"
