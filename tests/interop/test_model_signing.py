"""OpenSSF's model_signing command line and we: each verifies what the other signed, by key and by certificate."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from bundles.builder import Signing, build, sign
from bundles.trust import keys, oms
from bundles.trust.keys import Scheme
from bundles.trust.publishers import verify_model
from bundles.trust.roots import Root
from bundles.trust.signers import PrivateSigner, new_signer
from bundles.verify import verify
from tests.bundles.making import INSPECTOR, make_model, make_release, make_root, members_of, sha256
from tests.bundles.trusting import Authority, certified, root_of
from tests.interop.conftest import run

NOW = datetime.now(UTC)
YEAR = timedelta(days=365)


def _folder(path: Path) -> dict[str, str]:
    """A model whose files sort otherwise by path than by component; digests by path."""
    files = {"a.txt": b"a", "a/b.txt": b"b", "config.json": b"{}", "é.txt": b"c"}
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return {name: sha256(content) for name, content in files.items()}


def _resources(files: dict[str, str]) -> list[oms.Resource]:
    return [oms.Resource(*item) for item in files.items()]


def _pair(tmp_path: Path, scheme: Scheme = "ecdsa-sha2-nistp384") -> tuple[PrivateSigner, Path, Path]:
    signer, private, public = new_signer(scheme), tmp_path / "it.key", tmp_path / "it.pub"
    keys.save_private_key(signer.private, private)
    public.write_text(signer.key.public)
    return signer, private, public


@pytest.mark.parametrize("scheme", ["ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"])
def test_their_key_signature_verifies_here_and_ours_there(interop: Path, tmp_path: Path, scheme: Scheme) -> None:
    model, theirs, ours = tmp_path / "model", tmp_path / "theirs.sig", tmp_path / "ours.sig"
    files = _folder(model)
    signer, private, public = _pair(tmp_path, scheme)
    run(interop, "model_signing", "sign", "key", "--private_key", private, "--signature", theirs, model)
    signed = verify_model(theirs.read_bytes(), root_of({"publisher": [signer.key]}), NOW)
    oms.check_files(signed.resources, files)
    ours.write_bytes(oms.sign_model("model", _resources(files), signer))
    words = ("model_signing", "verify", "key", "--public_key", public, "--signature", ours, model)
    assert "succeeded" in run(interop, *words)


def test_their_certificate_signature_verifies_here_and_ours_there(interop: Path, tmp_path: Path) -> None:
    model, theirs, ours = tmp_path / "model", tmp_path / "theirs.sig", tmp_path / "ours.sig"
    files = _folder(model)
    signer, private, _ = _pair(tmp_path)
    root_ca = Authority.new("Root CA")
    between = Authority.new("Between", root_ca)
    leaf = between.leaf(signer.key, begins=NOW - timedelta(days=1), ends=NOW + YEAR)
    for name, certificate in (("leaf", leaf), ("between", between.certificate), ("root", root_ca.certificate)):
        (tmp_path / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    chain = ("--certificate_chain", tmp_path / "between.pem", "--certificate_chain", tmp_path / "root.pem")
    signing = ("--private_key", private, "--signing_certificate", tmp_path / "leaf.pem", *chain)
    run(interop, "model_signing", "sign", "certificate", *signing, "--signature", theirs, model)
    signed = verify_model(theirs.read_bytes(), root_of({}, extension=certified(root_ca)), NOW)
    oms.check_files(signed.resources, files)
    assert len(signed.certificates) == 2
    ours.write_bytes(oms.sign_model("model", _resources(files), signer, chain=[leaf, between.certificate]))
    words = ("--certificate_chain", tmp_path / "root.pem", "--signature", ours, model)
    assert "succeeded" in run(interop, "model_signing", "verify", "certificate", *words)


def test_a_second_post_quantum_signature_does_not_disturb_theirs(interop: Path, tmp_path: Path) -> None:
    model, ours = tmp_path / "model", tmp_path / "ours.sig"
    files = _folder(model)
    signer, _, public = _pair(tmp_path)
    ours.write_bytes(oms.sign_model("model", _resources(files), signer, second=new_signer("ml-dsa-87/1")))
    run(interop, "model_signing", "verify", "key", "--public_key", public, "--signature", ours, model)


def _root(publisher: PrivateSigner, release: PrivateSigner) -> Root:
    return make_root(1, {"root": [new_signer("ed25519")], "release": [release], "publisher": [publisher]})


def test_a_folder_that_their_tool_signed_becomes_a_bundle_that_verifies(interop: Path, tmp_path: Path) -> None:
    model, out = make_model(tmp_path / "model"), tmp_path / "tiny.bundle"
    (model / "canaries.json").unlink()
    publisher, private, _ = _pair(tmp_path)
    release = new_signer("ed25519")
    words = ("--private_key", private, "--signature", model / "model.sig", model)
    run(interop, "model_signing", "sign", "key", *words)
    build(make_release(), model, out, inspector=INSPECTOR)
    root = _root(publisher, release)
    sign(out, Signing(root, (release,)))
    assert verify(out, root, inspector=INSPECTOR).publishers == (publisher.key.keyid,)


def test_the_signature_in_our_bundle_verifies_with_their_tool(interop: Path, tmp_path: Path) -> None:
    model, out, signature = make_model(tmp_path / "model"), tmp_path / "tiny.bundle", tmp_path / "oms.sig"
    (model / "canaries.json").unlink()
    publisher, _, public = _pair(tmp_path)
    release = new_signer("ed25519")
    build(make_release(), model, out, inspector=INSPECTOR)
    sign(out, Signing(_root(publisher, release), (release,), publisher))
    signature.write_bytes(dict(members_of(out))["oms.sig"])
    words = ("model_signing", "verify", "key", "--public_key", public, "--signature", signature)
    run(interop, *words, model)
    (model / "config.json").write_bytes(b"{}")
    run(interop, *words, model, status=1)
