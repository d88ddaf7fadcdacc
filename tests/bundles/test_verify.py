"""A bundle is verified whole or refused by name; nothing behind a bad head is ever read."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bundles.builder import Output, Signing, build, sign
from bundles.content import forbidden
from bundles.format.errors import BundleError
from bundles.format.manifest import File, format_time
from bundles.pipeline import Progress, State
from bundles.trust import dsse
from bundles.trust.policy import Floor, Site
from bundles.trust.roots import Root
from bundles.trust.signers import new_signer
from bundles.verify import inspect, verify
from tests.bundles.hostile_content import zip_among_weights
from tests.bundles.making import (
    CHUNK,
    INSPECTOR,
    Members,
    Trust,
    forge_manifest,
    make_bundle,
    make_model,
    make_release,
    make_root,
    make_trust,
    members_of,
    replace_member,
    sha256,
    write_members,
)

Change = Callable[[dict[str, Any]], None]


def _refusal(path: Path, root: Root, site: Site | None = None) -> str:
    with pytest.raises(BundleError) as error:
        verify(path, root, site=site or Site(datetime.now(UTC), appliance="here"), inspector=INSPECTOR)
    return error.value.code


def test_a_sound_bundle_is_verified_step_by_step(bundle: Path, trust: Trust) -> None:
    told: list[Progress] = []
    verified = verify(bundle, trust.root, inspector=INSPECTOR, report=told.append)
    manifest = verified.manifest
    assert [p.state for p in told if p.state is not State.STREAMING] == [
        "quarantine",
        "signed",
        "policy",
        "content",
    ]
    assert max(p.bytes_done for p in told) == manifest.total_size == told[-1].bytes_total
    assert manifest.reference == "tiny@1.0.1"
    assert [file.path for file in manifest.files] == sorted(file.path for file in manifest.files)
    assert max(len(file.chunks) for file in manifest.files) == 4
    (canary,) = manifest.canary
    assert (canary.messages[0].content, canary.expected, canary.match, canary.max_tokens) == (
        "1+1=",
        "2",
        "exact",
        4,
    )
    assert "canaries.json" not in [file.path for file in manifest.files]
    payload = dsse.parse(dict(members_of(bundle))["manifest.dsse.json"], "it").payload
    assert verified.model_digest == sha256(payload)


def test_verifying_writes_nothing(bundle: Path, trust: Trust) -> None:
    before = {p: p.stat().st_mtime_ns for p in bundle.parent.iterdir()}
    os.chmod(bundle.parent, 0o500)
    try:
        verify(bundle, trust.root, inspector=INSPECTOR)
    finally:
        os.chmod(bundle.parent, 0o700)
    assert {p: p.stat().st_mtime_ns for p in bundle.parent.iterdir()} == before


@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_anywhere_is_refused(
    signed_once: Path, trust: Trust, tmp_path: Path, data: st.DataObject
) -> None:
    raw = bytearray(signed_once.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    path = tmp_path / "flipped"
    path.write_bytes(raw)
    assert _refusal(path, trust.root)


def _flip_in_signature(raw: bytes) -> bytes:
    envelope = dsse.parse(raw, "it")
    (signature,) = envelope.signatures
    flipped = bytes([signature.sig[0] ^ 1]) + signature.sig[1:]
    return dsse.Envelope(
        envelope.payload, envelope.payload_type, (dsse.Signature(signature.keyid, flipped),)
    ).encode()


def test_a_bundle_cut_anywhere_is_refused(bundle: Path, trust: Trust) -> None:
    raw = bundle.read_bytes()
    for length in [*range(0, len(raw), 512), len(raw) - 1]:
        bundle.write_bytes(raw[:length])
        assert _refusal(bundle, trust.root).startswith("CONTAINER_")


def test_two_release_keys_must_sign_where_the_root_says_two(tmp_path: Path) -> None:
    first, second = new_signer("ed25519"), new_signer("ed25519")
    publisher = new_signer("ecdsa-sha2-nistp256")
    root = make_root(
        1,
        {"root": [new_signer("ed25519")], "release": [first, second], "publisher": [publisher]},
        {"release": 2},
    )
    path = tmp_path / "b"
    build(make_release(), make_model(tmp_path / "m"), path, inspector=INSPECTOR)
    sign(path, Signing(root, (first,), publisher))
    assert _refusal(path, root) == "SIGNATURE_THRESHOLD"
    sign(path, Signing(root, (first,)))
    assert _refusal(path, root) == "SIGNATURE_THRESHOLD"
    sign(path, Signing(root, (second,)))
    assert len(verify(path, root, inspector=INSPECTOR).signers) == 2


def test_a_newer_root_in_the_bundle_is_followed_and_a_stranger_s_is_not(tmp_path: Path) -> None:
    old = make_trust()
    new_release = new_signer("ed25519")
    roles = {"root": [old.root_key], "release": [new_release], "publisher": [old.publisher_key]}
    second = make_root(2, roles)
    path = tmp_path / "b"
    build(make_release(), make_model(tmp_path / "m"), path, inspector=INSPECTOR)
    sign(path, Signing(second, (new_release,), old.publisher_key))
    verified = verify(path, old.root, inspector=INSPECTOR)
    assert [root.version for root in verified.new_roots] == [2]
    usurper = make_root(2, roles | {"root": [new_signer("ed25519")]})
    replace_member(path, "trust/2.root.json", lambda _: usurper.raw)
    assert _refusal(path, old.root) == "ROOT_NOT_SIGNED_BY_OLD"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: m["files"].append(m["files"][0]), "PATH_DUPLICATE"),
        (lambda m: m.update(extra=1), "MANIFEST_SCHEMA"),
        (lambda m: m.pop("requires"), "MANIFEST_SCHEMA"),
        (lambda m: m.update(sequence="1"), "MANIFEST_SCHEMA"),
        (lambda m: m.update(sequence=-1), "MANIFEST_SCHEMA"),
        (lambda m: m.update(sequence=2**53), "MANIFEST_SCHEMA"),
        (lambda m: m.update(files=[]), "MANIFEST_SCHEMA"),
        (lambda m: m.update(name="../x"), "MANIFEST_SCHEMA"),
        (lambda m: m.update(issued_at="2026-02-30T00:00:00Z"), "MANIFEST_SCHEMA"),
        (lambda m: m.update(schema="cloister.bundle/2"), "MANIFEST_SCHEMA"),
        (lambda m: m.update(volumes=[{"index": 1, "chunks": 1}]), "MANIFEST_VOLUMES"),
        (lambda m: m.update(kind="adapter"), "MANIFEST_REQUIRES"),
        (lambda m: m.update(kind="draft", requires=[{"name": "x", "model_digest": None}]), "BUNDLE_MIXED"),
        (lambda m: m.update(requires=[{"name": "x", "model_digest": None}]), "MANIFEST_REQUIRES"),
        (lambda m: m["licences"][0].update(member="licence/../../x"), "MANIFEST_SCHEMA"),
        (lambda m: m["licences"][0].update(member="attest/x"), "MANIFEST_DOCUMENTS"),
        (lambda m: m["licences"].append(m["licences"][0]), "MANIFEST_DOCUMENTS"),
        (lambda m: m.update(total_size=m["total_size"] + 1), "MANIFEST_SIZES"),
        (lambda m: m["files"][-1].update(chunks=[]), "MANIFEST_SIZES"),
        (lambda m: m["files"][0].update(sha256="0" * 64), "MANIFEST_SIZES"),
        (lambda m: m["files"][0].update(role="weights"), "MANIFEST_FILES"),
        (lambda m: m.update(oms_sha256=None), "OMS_MISSING"),
        (lambda m: m.update(oms_sha256="0" * 64), "OMS_DIGEST"),
        (lambda m: m.update(min_engine="99"), "ENGINE_TOO_OLD"),
        (lambda m: m.update(min_engine="9" * 5000), "MANIFEST_SCHEMA"),
        (lambda m: m.update(min_engine="0.1.0.0"), "MANIFEST_SCHEMA"),
        (lambda m: m.update(min_engine="0.\u0661"), "MANIFEST_SCHEMA"),
        (lambda m: m.update(not_before="2999-01-01T00:00:00Z"), "NOT_YET_VALID"),
        (lambda m: m.update(issued_at="2999-01-01T00:00:00Z"), "NOT_YET_VALID"),
        (lambda m: m["model"].update(parameters=1), "MODEL_DIFFERS"),
        (lambda m: m["model"].update(tokenizer_sha256=None), "MODEL_DIFFERS"),
        (lambda m: m.update(bundle_id="0" * 32), "BUNDLE_MIXED"),
    ],
)
def test_a_well_signed_manifest_that_may_not_be_is_refused_by_name(
    bundle: Path, trust: Trust, change: Change, code: str
) -> None:
    forge_manifest(bundle, trust, change)
    assert _refusal(bundle, trust.root) == code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: [*m, m[-1]], "CONTAINER_DUPLICATE"),
        (lambda m: [m[0], *m], "CONTAINER_DUPLICATE"),
        (lambda m: m[:-1], "CONTAINER_MISSING"),
        (lambda m: m[:5], "CONTAINER_MISSING"),
        (lambda m: [m[0], *m[2:3], m[1], *m[3:]], "CONTAINER_ORDER"),
        (lambda m: [("header.json", b" " * 5000), *m[1:]], "CONTAINER_MEMBER_SIZE"),
        (lambda m: [("header.json", b"{}"), *m[1:]], "HEADER_FORMAT"),
        (lambda m: [("header.json", m[0][1].replace(b"tiny", b"tina")), *m[1:]], "BUNDLE_MIXED"),
        (lambda m: [*m[:2], *m[1:]], "CONTAINER_DUPLICATE"),
    ],
)
def test_members_in_another_order_or_number_are_refused(
    bundle: Path, trust: Trust, change: Callable[[Members], Members], code: str
) -> None:
    write_members(bundle, change(members_of(bundle)))
    assert _refusal(bundle, trust.root) == code


def test_floors_refuse_the_old_the_other_and_the_early(bundle: Path, trust: Trust) -> None:
    now = datetime.now(UTC)
    digest = verify(bundle, trust.root, inspector=INSPECTOR).model_digest
    for floor, code in ((Floor(2, "0" * 64), "ROLLBACK_REFUSED"), (Floor(1, "0" * 64), "SEQUENCE_REUSED")):
        assert _refusal(bundle, trust.root, Site(now, floors=(("tiny", floor),))) == code
    same = Site(now, floors=(("tiny", Floor(1, digest)), ("other", Floor(9, "0" * 64))))
    verify(bundle, trust.root, site=same, inspector=INSPECTOR)
    assert _refusal(bundle, trust.root, Site(now, clock_floor=now + timedelta(days=2))) == "CLOCK_BEHIND"
    assert _refusal(bundle, trust.root, Site(now + timedelta(days=4000))) == "ROOT_EXPIRED"


def test_a_bundle_for_named_appliances_is_for_them_alone(tmp_path: Path, trust: Trust) -> None:
    path = make_bundle(tmp_path / "b", trust, targets=("ward-3", "ward-4"))
    now = datetime.now(UTC)
    assert _refusal(path, trust.root, Site(now, appliance="ward-5")) == "WRONG_TARGET"
    assert _refusal(path, trust.root, Site(now, appliance="")) == "WRONG_TARGET"
    verify(path, trust.root, site=Site(now, appliance="ward-4"), inspector=INSPECTOR)
    manifest = verify(path, trust.root, inspector=INSPECTOR).manifest
    assert manifest.targets == ("ward-3", "ward-4"), "who verifies without a name is told whom it is for"


def test_a_bundle_that_expires_is_refused_from_that_moment(tmp_path: Path, trust: Trust) -> None:
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=3)
    path = make_bundle(tmp_path / "b", trust, expires=expires)
    verify(path, trust.root, site=Site(expires - timedelta(seconds=1)), inspector=INSPECTOR)
    assert _refusal(path, trust.root, Site(expires)) == "BUNDLE_EXPIRED"
    assert inspect(path).manifest.expires == format_time(expires)


def test_inspecting_believes_nothing_without_a_root(bundle: Path, trust: Trust) -> None:
    seen = inspect(bundle)
    assert (seen.manifest.name, seen.verified, seen.refusal, seen.oms is not None) == ("tiny", None, None, True)
    trusted = inspect(bundle, trust.root)
    assert trusted.verified is not None
    replace_member(bundle, "manifest.dsse.json", _flip_in_signature)
    doubted = inspect(bundle, trust.root)
    assert doubted.verified is None
    assert doubted.refusal is not None
    assert doubted.refusal.code == "SIGNATURE_INVALID"


def test_inspecting_shows_documents_as_the_manifest_names_them(bundle: Path) -> None:
    seen = inspect(bundle)
    assert seen.documents["licence/LICENSE"] == b"Do as you like.\n"
    assert set(seen.documents) == {document.member for document in seen.manifest.documents}
    replace_member(bundle, "licence/LICENSE", lambda raw: raw.upper())
    with pytest.raises(BundleError, match="DOCUMENT_DIGEST"):
        inspect(bundle)


def test_what_judging_reads_again_is_kept_whole_and_beyond_memory_in_a_nameless_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bundles import verify as verifying

    monkeypatch.setattr(verifying, "MOST_MEMORY", 1000)
    kept = verifying.KeptFiles()
    content = bytes(range(256)) * 1024
    small, weights = (
        File(path=path, size=len(content), sha256="0" * 64, media_type="", role=role, chunks=())
        for path, role in (("a.json", "config"), ("w.safetensors", "weights"))
    )
    for file in (small, weights):
        kept.begin(file, lambda _: None)
        for at in range(0, len(content), 5000):
            kept.write(at, memoryview(content[at : at + 5000]))
        kept.end(file)
    assert kept.read("a.json", 0, 10**9) == content
    assert kept.read("a.json", 4990, 20) == content[4990:5010]
    head, tail = verifying.HEAD_BYTES, verifying.TAIL_BYTES
    assert kept.read("w.safetensors", 0, head) == content[:head]
    assert kept.read("w.safetensors", len(content) - tail, tail) == content[-tail:]
    asked: list[tuple[str, int, int]] = []

    def again(file: File, offset: int, length: int) -> bytes:
        asked.append((file.path, offset, length))
        return content[offset : offset + length]

    kept.again = again
    assert kept.read("w.safetensors", head, 1000) == content[head : head + 1000]
    assert kept.read("w.safetensors", len(content) - tail - 1, 2) == content[-tail - 1 : 1 - tail]
    assert asked == [("w.safetensors", head, 1000), ("w.safetensors", len(content) - tail - 1, 2)]
    kept.close()


@pytest.mark.parametrize("form", ["file", "volumes", "folder", "delta"])
def test_an_archive_whose_directory_is_far_from_its_end_is_refused_in_every_form(
    tmp_path: Path, trust: Trust, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What judging wants from the midst of weights is read again, and nothing else is."""
    model = make_model(tmp_path / "m")
    (model / "model.safetensors").write_bytes(zip_among_weights("offset"))
    monkeypatch.setattr(forbidden, "check_end", lambda *_: None)  # who builds it is an attacker
    base = tmp_path / "base"
    build(make_release(), model, base, inspector=INSPECTOR)
    sign(base, trust.signing())
    path, bases = base, []
    if form != "file":
        output = Output(
            directory=form == "folder",
            volume_size=120 * 1024 if form == "volumes" else None,
            signature_room=32 * 1024,
            base=base if form == "delta" else None,
        )
        path = tmp_path / "b"
        build(
            replace(make_release(), version="2.0.0", sequence=2), model, path, output=output, inspector=INSPECTOR
        )
        path, bases = (tmp_path / "b.001" if form == "volumes" else path), ([base] if form == "delta" else [])
        sign(path, trust.signing(), bases=bases)
    verify(path, trust.root, inspector=INSPECTOR, bases=bases)
    monkeypatch.undo()
    with pytest.raises(BundleError, match="CONTENT_ARCHIVE"):
        verify(path, trust.root, inspector=INSPECTOR, bases=bases)


def test_what_is_read_again_must_be_what_was_verified(
    tmp_path: Path, trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = make_model(tmp_path / "m"), tmp_path / "b"
    (model / "model.safetensors").write_bytes(zip_among_weights("size"))
    with monkeypatch.context() as attacker:
        attacker.setattr(forbidden, "check_end", lambda *_: None)
        build(make_release(), model, path, inspector=INSPECTOR)
    sign(path, trust.signing())

    def hide(progress: Progress) -> None:
        if progress.state is State.CONTENT:
            path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x01"))

    with pytest.raises(BundleError, match="SOURCE_CHANGED"):
        verify(path, trust.root, inspector=INSPECTOR, report=hide)


def test_the_ring_holds_few_buffers_however_large_the_bundle(
    tmp_path: Path, trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bundles import ring
    from bundles import verify as verifying

    model = make_model(tmp_path / "m")
    (model / "long.txt").write_bytes(b"0123456789abcdef" * 16 * CHUNK)
    path = tmp_path / "b"
    build(make_release(), model, path, inspector=INSPECTOR)
    sign(path, trust.signing())
    seen: set[int] = set()
    real = verifying.KeptFiles.write

    def watching(self: Any, offset: int, block: memoryview) -> None:
        seen.add(id(block.obj))
        real(self, offset, block)

    monkeypatch.setattr(verifying.KeptFiles, "write", watching)
    manifest = verify(path, trust.root, inspector=INSPECTOR).manifest
    assert sum(len(file.chunks) for file in manifest.files) > 256
    assert len(seen) == ring.RING_BUFFERS


def test_a_manifest_over_its_limit_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    from bundles.format import manifest

    monkeypatch.setattr(manifest, "MAX_MANIFEST", 100)
    monkeypatch.setattr(manifest.strict_json, "parse_object", None)
    with pytest.raises(BundleError, match="MANIFEST_TOO_LARGE"):
        manifest.parse(b" " * 101)


def test_a_manifest_that_nobody_vouches_for_says_nothing_of_its_own_in_a_refusal(
    bundle: Path, trust: Trust
) -> None:
    for fields in ({"x\nVERIFIED\x1b[2J": 1}, {"x" * 100_000: 1}, {"issued_at": "9" * 100_000}):
        path = Path(shutil.copy(bundle, bundle.with_name("other")))
        forge_manifest(path, trust, lambda manifest, fields=fields: manifest.update(fields))
        with pytest.raises(BundleError, match="MANIFEST_SCHEMA") as error:
            inspect(path)
        assert error.value.message.isprintable()
        assert len(error.value.message) < 500
