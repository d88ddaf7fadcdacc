"""Model versions: what lets one run, who says so, and that the log hears of every change of the store once."""

import shutil
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from appliance.control.db.models import Untold
from appliance.protos import admin_pb2
from bundles.protos import importer_pb2
from engine.protos import engine_pb2
from tests.appliance.control_house import DIGEST, House, make_home, new_house, refusal, running, until

COMMITTED = importer_pb2.IMPORT_STATE_COMMITTED


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with new_house() as made:
        yield made


def load(accept: bool = False, name: str = "notes") -> admin_pb2.LoadModelRequest:
    return admin_pb2.LoadModelRequest(model_version="notes@1", name=name, accept_licence=accept)


async def version(house: House) -> admin_pb2.ModelVersion:
    listed = await house.models.ListModelVersions(admin_pb2.ListModelVersionsRequest())
    return listed.versions[0]


async def approve(house: House, envelope: bytes) -> admin_pb2.ModelVersion:
    answer = await house.models.ApproveModelVersion(admin_pb2.ApproveModelVersionRequest(envelope=envelope))
    return answer.version


def wants_two_custodians(house: House) -> None:
    house.importer.versions[0].approvals_required = 2
    house.importer.custodians = ["k1", "k2"]
    house.importer.approvals = {b"one": (DIGEST, ["k1"]), b"both": (DIGEST, ["k1", "k2"])}


async def test_a_version_runs_once_enough_custodians_have_approved_it(house: House) -> None:
    wants_two_custodians(house)
    assert (await version(house)).state == "committed"
    error = await refusal(house.models.LoadModel(load()))
    assert (error.status, error.code) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_APPROVED")
    activate = admin_pb2.ActivateModelRequest(model_version="notes@1", alias="notes")
    assert (await refusal(house.models.ActivateModel(activate))).code == "NOT_APPROVED"
    once = await approve(house, b"one")
    assert (once.state, list(once.approvals), once.approvals_required) == ("committed", ["k1"], 2)
    assert (await refusal(house.models.LoadModel(load()))).code == "NOT_APPROVED"
    assert (await approve(house, b"both")).state == "approved"
    assert (await approve(house, b"both")).state == "approved"
    await house.models.LoadModel(load())
    (told,) = house.records("version.state")
    assert (told.decision, told.actor, list(told.facts["custodians"])) == ("approved", "alice", ["k1", "k2"])


async def test_an_approval_counts_only_as_long_as_the_trust_in_force_bears_it_out(house: House) -> None:
    wants_two_custodians(house)
    await approve(house, b"both")
    house.importer.custodians = ["k2", "k3"]
    house.importer.approvals = {b"both": (DIGEST, ["k2"])}
    assert (await version(house)).state == "committed"
    assert (await refusal(house.models.LoadModel(load()))).code == "NOT_APPROVED"
    house.importer.approvals = {}
    error = await refusal(house.models.LoadModel(load()))
    assert (error.code, error.metadata["approvals"]) == ("NOT_APPROVED", "0")


async def test_the_log_calls_approved_only_what_enough_custodians_of_today_approved(house: House) -> None:
    wants_two_custodians(house)
    await approve(house, b"one")
    house.importer.custodians = ["k2", "k3"]
    house.importer.approvals = {b"two": (DIGEST, ["k2"]), b"three": (DIGEST, ["k3"])}
    assert (await approve(house, b"two")).state == "committed"
    assert house.records("version.state") == []
    assert (await approve(house, b"three")).state == "approved"
    (told,) = house.records("version.state")
    assert list(told.facts["custodians"]) == ["k2", "k3"]


async def test_what_no_custodian_signed_approves_nothing(house: House) -> None:
    wants_two_custodians(house)
    for envelope, code in (
        (b"forged", "APPROVAL_INVALID"),
        (b"", "INVALID_APPROVAL"),
        (b"x" * (2 << 20), "INVALID_APPROVAL"),
    ):
        request = admin_pb2.ApproveModelVersionRequest(envelope=envelope)
        assert (await refusal(house.models.ApproveModelVersion(request))).code == code
    assert list((await version(house)).approvals) == []


async def test_a_licence_that_asks_for_it_is_accepted_once_by_a_name(house: House) -> None:
    house.importer.versions[0].licences.add(spdx="LicenseRef-ward", accept=True)
    house.importer.versions[0].licences.add(spdx="MIT")
    assert (await version(house)).licence_acceptance
    error = await refusal(house.models.LoadModel(load()))
    assert (error.code, error.metadata["licences"]) == ("LICENCE_NOT_ACCEPTED", "LicenseRef-ward")
    await house.models.LoadModel(load(accept=True))
    await house.models.LoadModel(load(name="again"))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"revoked": "KEY_REVOKED"}, "MODEL_REVOKED"),
        ({"damaged": ["config.json"]}, "MODEL_DAMAGED"),
        ({"approvals_required": 1}, "NOT_APPROVED"),
    ],
)
async def test_what_is_not_sound_is_neither_loaded_nor_activated(
    house: House, fields: dict[str, Any], code: str
) -> None:
    house.importer.versions[0].MergeFrom(importer_pb2.ModelVersion(**fields))
    assert (await refusal(house.models.LoadModel(load()))).code == code
    activate = admin_pb2.ActivateModelRequest(model_version="notes", alias="notes")
    assert (await refusal(house.models.ActivateModel(activate))).code == code
    assert not house.host.told[-1].deployments


async def test_a_version_is_active_while_an_alias_answers_with_it_and_retired_after_that(house: House) -> None:
    assert (await version(house)).state == "approved"
    await house.models.LoadModel(load())
    assert (await version(house)).state == "approved"
    for alias in ("a", "b"):
        await house.models.SetAlias(admin_pb2.SetAliasRequest(name=alias, deployment="notes"))
    assert ((await version(house)).state, list((await version(house)).aliases)) == ("active", ["a", "b"])
    house.importer.add(2)
    await house.models.LoadModel(admin_pb2.LoadModelRequest(model_version="notes@2", name="notes"))
    assert (await version(house)).state == "retired"
    for alias in ("a", "b"):
        await house.models.RemoveAlias(admin_pb2.RemoveAliasRequest(name=alias))
    told = [(r.decision, r.facts["model_version"]) for r in house.records("version.state")]
    assert told == [("active", "notes@1"), ("active", "notes@2"), ("retired", "notes@1"), ("retired", "notes@2")]


async def test_a_version_that_something_runs_is_not_removed(house: House) -> None:
    await house.models.LoadModel(load())
    request = admin_pb2.RemoveModelVersionRequest(model_version="notes@1")
    error = await refusal(house.models.RemoveModelVersion(request))
    assert (error.status, error.code) == (grpc.StatusCode.FAILED_PRECONDITION, "VERSION_IN_USE")
    assert len(house.importer.versions) == 1
    await house.models.UnloadModel(admin_pb2.UnloadModelRequest(name="notes"))
    removed = await house.models.RemoveModelVersion(request)
    assert (removed.model_version, removed.freed_bytes, house.importer.versions) == ("notes@1", 5, [])
    assert (await refusal(house.models.RemoveModelVersion(request))).code == "VERSION_NOT_FOUND"


async def test_what_was_said_about_a_version_is_forgotten_with_it(house: House) -> None:
    wants_two_custodians(house)
    await approve(house, b"both")
    await house.models.RemoveModelVersion(admin_pb2.RemoveModelVersionRequest(model_version="notes@1"))
    house.importer.add(1, approvals_required=2)
    again = await version(house)
    assert (again.state, list(again.approvals)) == ("committed", [])


async def test_volumes_imports_store_scrub_and_trust_are_shown_as_the_importer_has_them(house: House) -> None:
    offer = admin_pb2.OfferVolumeRequest(import_id="i1", path="/media/b")
    await house.models.OfferVolume(offer)
    await house.models.CancelImport(admin_pb2.CancelImportRequest(import_id="i1"))
    assert (house.importer.offered, house.importer.cancelled) == ([("i1", "/media/b")], ["i1"])
    (one,) = (await house.models.ListImports(admin_pb2.ListImportsRequest())).imports
    assert (one.path, one.started_at.seconds, one.progress.state) == ("/media/a", 1, "streaming")
    assert (one.progress.volume_wanted, one.progress.volumes) == (2, 3)
    store = await house.models.GetStore(admin_pb2.GetStoreRequest())
    assert (store.bytes, store.HasField("scrubbed_at"), store.damaged[0].finding) == (3, False, "changed")
    scrubs = [s async for s in house.models.ScrubStore(admin_pb2.ScrubStoreRequest())]
    assert [(s.bytes_done, s.ended) for s in scrubs] == [(1, False), (2, True)]
    trust = await house.models.GetTrust(admin_pb2.GetTrustRequest())
    assert (trust.root_version, list(trust.warnings), trust.roles[0].name) == (3, ["TRUST_STALE"], "custodian")
    assert not trust.HasField("revocation_expires")


async def test_a_volume_that_is_not_wanted_is_refused_with_the_importer_s_own_code(house: House) -> None:
    for path, code in (("/wrong", "VOLUME_ORDER"), ("relative", "INVALID_PATH")):
        request = admin_pb2.OfferVolumeRequest(import_id="i1", path=path)
        assert (await refusal(house.models.OfferVolume(request))).code == code
    request = admin_pb2.OfferVolumeRequest(path="/a")
    assert (await refusal(house.models.OfferVolume(request))).code == "INVALID_IMPORT"
    assert house.importer.offered == []


def entry(sequence: int, event: str, **fields: Any) -> importer_pb2.ReadOutboxResponse:
    return importer_pb2.ReadOutboxResponse(sequence=sequence, event=event, utc_ns=sequence, **fields)


async def test_every_change_of_the_store_is_in_the_log_once_even_if_its_acknowledgement_is_lost() -> None:
    home = make_home()
    events = [
        entry(1, "import", import_id="i1", state=COMMITTED, model_version="notes@1", model_digest=DIGEST),
        entry(2, "damage", model_version="notes@1", model_digest=DIGEST, detail="ab changed"),
        entry(3, "repair", model_version="notes@1", detail="ab"),
        entry(4, "trust", detail="root 4"),
        entry(5, "removal", model_version="old@1", model_digest="cd"),
    ]
    try:
        house = House(home)
        house.importer.outbox, house.importer.acknowledges = events, False
        async with running(home, house):
            await until(lambda: house.records("version.state"))
        house.importer.acknowledges = True
        async with running(home, house):
            await until(lambda: house.importer.acknowledged == [1, 2, 3, 4, 5])
            kinds = (
                "bundle.state",
                "version.state",
                "store.damage",
                "store.repair",
                "trust.change",
                "model.removal",
            )
            told = [(r.kind, r.decision) for r in house.records() if r.kind in kinds]
            assert told == [
                ("bundle.state", "committed"), ("version.state", "approved"), ("store.damage", "found"),
                ("store.repair", "repaired"), ("trust.change", "accepted"), ("model.removal", "removed"),
            ]  # fmt: skip
            assert house.records("version.state")[0].facts["because"] == "the trust root names no custodians"
            assert house.records("store.damage")[0].facts["detail"] == "ab changed"
    finally:
        shutil.rmtree(home.root.parent)


async def test_a_version_that_custodians_must_approve_is_not_approved_by_being_committed() -> None:
    home = make_home()
    try:
        house = House(home)
        house.importer.versions[0].approvals_required = 1
        house.importer.outbox = [entry(1, "import", import_id="i1", state=COMMITTED, model_digest=DIGEST)]
        async with running(home, house):
            await until(lambda: house.importer.acknowledged == [1])
            assert house.records("version.state") == []
    finally:
        shutil.rmtree(home.root.parent)


async def test_a_change_whose_record_was_lost_on_the_way_is_told_by_the_next_start_and_once() -> None:
    home = make_home()
    try:
        house = House(home)
        async with running(home, house, begin=False):
            await house.plane.database.run(
                lambda s: s.add(
                    Untold(id="u1", kind="version.state", actor="alice", decision="active", facts="{}", utc_ns=1)
                )
            )
            real, house.plane.untold._database = house.plane.untold._database, _Fails(house.plane.untold._database)
            with pytest.raises(RuntimeError):
                await house.plane.untold.tell()
            house.plane.untold._database = real
            assert len(house.records("version.state")) == 1
        async with running(home, house):
            await house.plane.untold.tell()
            assert len(house.records("version.state")) == 1
            assert await house.plane.database.run(lambda s: s.query(Untold).count()) == 0
    finally:
        shutil.rmtree(home.root.parent)


class _Fails:
    """Reads, and is killed before it can delete."""

    def __init__(self, database: Any) -> None:
        self._database, self._calls = database, 0

    async def run(self, work: Any) -> Any:
        self._calls += 1
        if self._calls > 1:
            raise RuntimeError("killed here")
        return await self._database.run(work)


async def test_a_deployment_of_a_revoked_version_goes_on_and_is_not_started_again() -> None:
    home = make_home()
    try:
        house = House(home)
        async with running(home, house):
            await house.serving()
        house.importer.versions[0].revoked = "MANIFEST_REVOKED"
        house.importer.outbox = [entry(1, "trust", detail="root 1, revocations 2")]
        async with running(home, house):
            await until(lambda: house.importer.acknowledged == [1])
            await house.ready("notes")
            assert (await house.models.ListDeployments(admin_pb2.ListDeploymentsRequest())).deployments[
                0
            ].state == ("ready")
            (revoked,) = [r for r in house.records("version.state") if r.decision == "revoked"]
            assert (revoked.facts["reason"], list(revoked.facts["deployments"])) == ("MANIFEST_REVOKED", ["notes"])
        async with running(home, house):
            await house.ready("notes")  # control alone began anew
            house.host.states["notes"] = engine_pb2.DEPLOYMENT_STATE_RESTARTING
            await house.host.say()
            await until(lambda: not house.host.told[-1].deployments)
            await house.host.say()
            (shown,) = (await house.models.ListDeployments(admin_pb2.ListDeploymentsRequest())).deployments
            assert (shown.state, shown.reason) == ("failed", "MODEL_REVOKED")
            house.host.states.clear()
        house.host.told.clear()  # as an engine-host that begins anew
        house.importer.versions[0].revoked, house.importer.outbox = "", [entry(2, "trust")]
        async with running(home, house):
            await house.ready("notes")
            assert [len(told.deployments) for told in house.host.told] == [0, 1], (
                "not before it is vouched for again"
            )
    finally:
        shutil.rmtree(home.root.parent)
