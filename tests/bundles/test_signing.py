"""Who signs a model: its publisher by key or certificate, or the site in the place of another."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from bundles.builder import Output, Signing, build, sign
from bundles.format.errors import BundleError
from bundles.pipeline import Progress
from bundles.trust import oms
from bundles.trust.signers import PrivateSigner, new_signer
from bundles.verify import inspect, verify
from tests.bundles.making import INSPECTOR, Trust, make_model, make_release, members_of, replace_member, sha256
from tests.bundles.trusting import DAY, NOW, RELEASE_KEY, ROOT_KEY, Authority, certified, revocations, root_of

PUBLISHER, SITE, POST_QUANTUM = (
    new_signer("ecdsa-sha2-nistp384"),
    new_signer("ecdsa-sha2-nistp256"),
    new_signer("ml-dsa-87/1"),
)
ROOT = root_of(
    {"publisher": [PUBLISHER.key, POST_QUANTUM.key], "site-publisher": [SITE.key], "release": [RELEASE_KEY.key]}
)


def _upstream(model: Path, signer: PrivateSigner) -> bytes:
    """The source's own signature, over its files as they are now."""
    listed = [path for path in model.iterdir() if path.name not in ("canaries.json", "model.sig")]
    resources = [oms.Resource(path.name, sha256(path.read_bytes())) for path in listed]
    raw = oms.sign_model("upstream", resources, signer)
    (model / "model.sig").write_bytes(raw)
    return raw


def test_a_converted_source_is_signed_by_the_site_and_its_signature_kept_as_provenance(tmp_path: Path) -> None:
    model, out = make_model(tmp_path / "m"), tmp_path / "b"
    upstream = _upstream(model, new_signer("ecdsa-sha2-nistp384"))
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')  # converted since
    manifest = build(make_release(site_publisher=True), model, out, inspector=INSPECTOR)
    members = dict(members_of(out))
    assert members["attest/upstream-model.sig"] == upstream
    assert "oms.sig" not in members
    assert b'"coversTheseFiles":false' in members["attest/slsa.json"]
    sign(out, Signing(ROOT, (RELEASE_KEY,), SITE, site=True))
    verified = verify(out, ROOT, inspector=INSPECTOR)
    assert (verified.publisher_role, verified.publishers) == ("site-publisher", (SITE.key.keyid,))
    assert verified.manifest.bundle_id == manifest.bundle_id
    assert dict(members_of(out))["attest/upstream-model.sig"] == upstream


def test_signing_for_the_site_later_moves_a_stranger_s_signature_aside(tmp_path: Path) -> None:
    model, out = make_model(tmp_path / "m"), tmp_path / "b"
    upstream = _upstream(model, new_signer("ecdsa-sha2-nistp384"))
    build(make_release(), model, out, inspector=INSPECTOR)
    assert dict(members_of(out))["oms.sig"] == upstream
    with pytest.raises(BundleError, match="OMS_UNKNOWN_KEY"):
        sign(out, Signing(ROOT, (RELEASE_KEY,)))
    sign(out, Signing(ROOT, (), SITE, site=True))
    sign(out, Signing(ROOT, (RELEASE_KEY,), SITE, site=True))  # again: its own signature is no provenance
    verified = verify(out, ROOT, inspector=INSPECTOR)
    assert [d.member for d in verified.manifest.attestations].count("attest/upstream-model.sig") == 1
    assert dict(members_of(out))["attest/upstream-model.sig"] == upstream


def test_each_publisher_s_key_signs_in_its_own_role_only(tmp_path: Path) -> None:
    model, out = make_model(tmp_path / "m"), tmp_path / "b"
    build(make_release(), model, out, inspector=INSPECTOR)
    for signing in (
        Signing(ROOT, (), SITE),
        Signing(ROOT, (), PUBLISHER, site=True),
        Signing(ROOT, (), PUBLISHER, second=new_signer("ml-dsa-87/1")),
        Signing(ROOT, (PUBLISHER,)),
    ):
        with pytest.raises(BundleError, match="KEY_NOT_IN_ROLE"):
            sign(out, signing)


def test_a_second_post_quantum_signature_of_the_publisher_travels_behind_the_first(tmp_path: Path) -> None:
    out = tmp_path / "b"
    build(make_release(), make_model(tmp_path / "m"), out, inspector=INSPECTOR)
    sign(out, Signing(ROOT, (RELEASE_KEY,), PUBLISHER, second=POST_QUANTUM))
    verified = verify(out, ROOT, inspector=INSPECTOR)
    assert set(verified.publishers) == {PUBLISHER.key.keyid, POST_QUANTUM.key.keyid}


def test_a_publisher_with_a_certificate_needs_no_key_in_the_root(tmp_path: Path) -> None:
    out, authority, signer = tmp_path / "b", Authority.new(), new_signer("ecdsa-sha2-nistp384")
    root = root_of({"publisher": [PUBLISHER.key]}, extension=certified(authority))
    build(make_release(), make_model(tmp_path / "m"), out, inspector=INSPECTOR)
    sign(out, Signing(root, (RELEASE_KEY,), signer, chain=(authority.leaf(signer.key),)))
    verified = verify(out, root, inspector=INSPECTOR)
    assert verified.publishers == (signer.key.keyid,)
    assert verified.certificates


def test_a_certificate_of_nobody_the_root_knows_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out, signer = tmp_path / "b", new_signer("ecdsa-sha2-nistp384")
    build(make_release(), make_model(tmp_path / "m"), out, inspector=INSPECTOR)
    before = out.read_bytes()
    root = root_of({"publisher": [PUBLISHER.key]}, extension=certified(Authority.new()))
    with pytest.raises(BundleError, match="CERTIFICATE_UNTRUSTED"):
        sign(out, Signing(root, (RELEASE_KEY,), signer, chain=(Authority.new().leaf(signer.key),)))
    assert out.read_bytes() == before


def test_what_no_import_would_take_is_refused_before_a_chunk_is_read(tmp_path: Path) -> None:
    model, out = make_model(tmp_path / "m"), tmp_path / "b"
    build(make_release(), model, out, inspector=INSPECTOR)
    chunk = next(name for name, _ in members_of(out) if name.startswith("c/"))
    replace_member(out, chunk, lambda raw: b"!" + raw[1:])
    stranger, old = revocations(signers=(SITE,)).raw, revocations(expires=NOW - DAY).raw
    for signing, code in (
        (Signing(ROOT, (RELEASE_KEY,)), "OMS_MISSING"),
        (Signing(ROOT, (RELEASE_KEY,), oms=b"{}"), "OMS_SCHEMA"),
        (Signing(ROOT, (RELEASE_KEY,), PUBLISHER, revocation=b"{}"), "ENVELOPE_SCHEMA"),
        (Signing(ROOT, (RELEASE_KEY,), PUBLISHER, revocation=stranger), "SIGNATURE_WRONG_ROLE"),
        (Signing(ROOT, (RELEASE_KEY,), PUBLISHER, revocation=old), "REVOCATION_EXPIRED"),
        (Signing(ROOT, (RELEASE_KEY,), PUBLISHER), "CHUNK_DIGEST"),
    ):
        with pytest.raises(BundleError, match=code):
            sign(out, signing)


def test_a_source_s_signature_of_any_kind_is_kept_where_the_site_signs(tmp_path: Path) -> None:
    model, out = make_model(tmp_path / "m"), tmp_path / "b"
    keyless = b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "verificationMaterial": {}}'
    (model / "model.sig").write_bytes(keyless)
    with pytest.raises(BundleError, match="OMS_SCHEMA"):
        build(make_release(), model, out, inspector=INSPECTOR)
    build(make_release(site_publisher=True), model, out, inspector=INSPECTOR)
    sign(out, Signing(ROOT, (RELEASE_KEY,), SITE, site=True))
    assert verify(out, ROOT, inspector=INSPECTOR).publisher_role == "site-publisher"
    assert dict(members_of(out))["attest/upstream-model.sig"] == keyless


def test_earlier_roots_and_revocations_travel_for_appliances_that_know_less(tmp_path: Path) -> None:
    out = tmp_path / "b"
    first, second, third = (
        root_of({"publisher": [PUBLISHER.key]}, version=n, signers=(ROOT_KEY,)) for n in (1, 2, 3)
    )
    build(make_release(), make_model(tmp_path / "m"), out, inspector=INSPECTOR)
    document = revocations(expires=datetime.now(UTC) + DAY)
    sign(out, Signing(third, (RELEASE_KEY,), PUBLISHER, earlier=(second,), revocation=document.raw))
    verified = verify(out, first, inspector=INSPECTOR)
    assert [root.version for root in verified.new_roots] == [2, 3]
    assert verified.revocations is not None
    assert dict(members_of(out))["trust/revocation.json"] == document.raw


def test_a_signature_of_a_bundle_is_the_release_role_s(tmp_path: Path, trust: Trust) -> None:
    out = tmp_path / "b"
    build(make_release(), make_model(tmp_path / "m"), out, inspector=INSPECTOR)
    signers = sign(out, trust.signing())
    assert signers == inspect(out).keyids == (trust.release_key.key.keyid,)


@pytest.mark.parametrize("folder", [False, True])
def test_two_who_sign_at_once_lose_no_signature(tmp_path: Path, folder: bool) -> None:
    """The one that ends later is told to repeat; what the other signed is there."""
    other, path = new_signer("ed25519"), tmp_path / "b"
    root = root_of({"publisher": [PUBLISHER.key], "release": [RELEASE_KEY.key, other.key]})
    build(make_release(), make_model(tmp_path / "m"), path, inspector=INSPECTOR, output=Output(directory=folder))
    sign(path, Signing(root, (), PUBLISHER))

    def meanwhile(progress: Progress) -> None:
        if progress.bytes_done == progress.bytes_total and not signed:
            signed.extend(sign(path, Signing(root, (other,))))

    signed: list[str] = []
    with pytest.raises(BundleError, match="SOURCE_CHANGED"):
        sign(path, Signing(root, (RELEASE_KEY,)), report=meanwhile)
    assert list(inspect(path).keyids) == signed == [other.key.keyid]
    assert set(sign(path, Signing(root, (RELEASE_KEY,)))) == {other.key.keyid, RELEASE_KEY.key.keyid}
    assert not [left for left in tmp_path.iterdir() if left.name.startswith(".")]
