"""Digests of derived files: recorded once, given back to engine-host, forgotten when bad or wanted no more."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator

import pytest
from sqlalchemy import select

from appliance.control.db.models import Derived
from appliance.control.derived import DerivedFiles
from appliance.control.home import Home
from appliance.protos import admin_pb2
from engine.protos import engine_pb2
from tests.appliance.control_house import DIGEST, House, make_home, new_house, running

LAYOUT = "cpu-bfloat16-0123456789abcdef"
FILE = engine_pb2.Derived(model_digest=DIGEST, layout=LAYOUT, sha256="cd" * 32, size=7)
OTHER = engine_pb2.Derived(model_digest=DIGEST, layout=LAYOUT, sha256="ef" * 32, size=8)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with new_house() as made:
        yield made


@pytest.fixture
def home() -> Iterator[Home]:
    made = make_home()
    yield made
    shutil.rmtree(made.root.parent)


async def on_record(house: House) -> list[tuple[str, int]]:
    rows = await house.plane.database.run(lambda s: s.scalars(select(Derived)).all())
    return [(row.sha256, row.size) for row in rows]


async def say(house: House, derived: engine_pb2.Derived | None, refused: engine_pb2.Derived | None = None) -> None:
    house.host.derived, house.host.refused = derived, refused
    await house.host.say()


async def becomes(house: House, *wanted: engine_pb2.Derived) -> None:
    while await on_record(house) != [(one.sha256, one.size) for one in wanted]:
        await asyncio.sleep(0.01)


def decisions(house: House) -> list[tuple[str, str]]:
    return [(record.decision, record.facts["sha256"]) for record in house.records("model.derived")]


async def load(house: House) -> None:
    await house.models.LoadModel(admin_pb2.LoadModelRequest(model_version="notes", name="notes"))
    await house.ready("notes")


async def test_a_file_is_recorded_once_given_back_and_forgotten_with_its_last_deployment(home: Home) -> None:
    async with running(home) as house:
        await load(house)
        await say(house, FILE)
        await becomes(house, FILE)
        await say(house, FILE)
        await house.plane.deployments.changed()
        assert list(house.host.told[-1].derived) == [FILE]
        assert not house.host.told[-1].deployments[0].HasField("derived")
        await house.plane.untold.tell()
        assert decisions(house) == [("recorded", FILE.sha256)]
        assert house.records("model.derived")[0].facts["layout"] == LAYOUT
    async with running(home) as house:  # another control, another engine-host that has made nothing
        await house.ready("notes")
        assert list(house.host.told[-1].derived) == [FILE]
        await house.models.UnloadModel(admin_pb2.UnloadModelRequest(name="notes"))
        assert list(house.host.told[-1].derived) == []
        assert await on_record(house) == []
        await house.plane.untold.tell()
        assert decisions(house) == [("recorded", FILE.sha256), ("removed", FILE.sha256)]


async def test_a_file_made_anew_takes_the_place_of_the_one_before(house: House) -> None:
    await load(house)
    await say(house, FILE)
    await becomes(house, FILE)
    await say(house, OTHER)
    await becomes(house, OTHER)


async def test_a_file_of_other_libraries_is_forgotten_when_theirs_is_recorded_and_one_of_other_kernels_is_not(
    house: House,
) -> None:
    await load(house)
    newer, torch = (
        engine_pb2.Derived(model_digest=DIGEST, layout=layout, sha256="ab" * 32, size=9)
        for layout in (LAYOUT[:-1] + "0", LAYOUT.replace("cpu", "torch"))
    )
    await say(house, FILE)
    await becomes(house, FILE)
    await say(house, torch)
    await becomes(house, FILE, torch)
    await say(house, newer)
    await becomes(house, newer, torch)
    await house.plane.untold.tell()
    assert ("replaced", FILE.sha256) in decisions(house)


async def test_a_file_that_a_worker_refused_is_forgotten_and_on_record_as_such(house: House) -> None:
    await load(house)
    await say(house, FILE)
    await becomes(house, FILE)
    await say(house, None, OTHER)  # not the one on record
    await say(house, None, FILE)
    await becomes(house)
    await house.plane.deployments.changed()
    assert list(house.host.told[-1].derived) == []
    await house.plane.untold.tell()
    assert decisions(house) == [("recorded", FILE.sha256), ("refused", FILE.sha256)]
    await say(house, FILE)  # made again, bit for bit
    await becomes(house, FILE)


async def test_what_is_no_file_of_ours_or_of_no_deployment_is_not_recorded(house: House) -> None:
    await load(house)
    files = DerivedFiles(house.plane.database)
    for change in ({"layout": "../x"}, {"sha256": "cd"}, {"model_digest": "ab" * 32}, {"size": 1 << 63}):
        wrong = engine_pb2.Derived()
        wrong.CopyFrom(FILE)
        wrong.MergeFrom(engine_pb2.Derived(**change))  # type: ignore[arg-type]  # each is of its field's type
        await files.hear([engine_pb2.DeploymentStatus(derived=wrong)])
        assert await on_record(house) == []
    await files.hear([engine_pb2.DeploymentStatus(derived=FILE)])
    assert await on_record(house) == [(FILE.sha256, FILE.size)]
