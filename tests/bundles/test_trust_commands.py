"""`cloister trust` as holders of keys type it: ceremonies, rotation, revocation, approval."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from appliance.cli.main import main
from bundles.trust import keys, revocation, roots
from bundles.trust.approval import verify_approval
from bundles.trust.bundle import write_trust_bundle
from bundles.trust.roots import Root
from bundles.verify import read_trust_bundle
from tests.bundles.trusting import DAY, NOW, Authority

DIGEST = "5e" * 32


def _json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["--json", *map(str, words)]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def _run(*words: str | Path) -> int:
    """The exit status."""
    try:
        return main([*map(str, words)])
    except SystemExit as left:
        return int(left.code or 0)


def _init(out: Path, *more: str | Path) -> Root:
    assert _run("trust", "init", "--out", out, *more) == 0
    return roots.load(out / "root.json")


def _keyid(path: Path) -> str:
    return keys.load_public_key(path.with_suffix(".pub")).keyid


def test_several_holders_have_a_key_each_and_a_majority_signs(tmp_path: Path) -> None:
    root = _init(tmp_path / "k", "--root-keys", "3", "--release-keys", "3", "--custodians", "2")
    thresholds = {name: (role.threshold, len(role.keyids)) for name, role in root.roles.items()}
    assert thresholds == {
        "root": (2, 3),
        "release": (2, 3),
        "publisher": (1, 1),
        "revocation": (1, 1),
        "custodian": (2, 2),
    }
    assert root.roles["release"].keyids[1] == _keyid(tmp_path / "k" / "release-2.key")
    assert (tmp_path / "k" / "custodian-2.key").stat().st_mode & 0o777 == 0o600


def test_every_holder_of_a_hybrid_root_has_two_keys(tmp_path: Path) -> None:
    root = _init(tmp_path / "k", "--hybrid", "--release-keys", "2", "--release-threshold", "1")
    assert root.extension.hybrid == root.roles.keys()
    assert (root.roles["release"].threshold, len(root.roles["release"].keyids)) == (2, 4)
    assert [key.scheme for key in root.role_keys("publisher")] == ["ecdsa-sha2-nistp384", "ml-dsa-87/1"]


@pytest.mark.parametrize(
    "words",
    [
        ("--release-keys", "0"),
        ("--release-keys", "2", "--release-threshold", "3"),
        ("--custodian-threshold", "1"),
        ("--public", "release"),
        ("--sign-with", "true"),
        ("--crl-required", "publisher"),
    ],
)
def test_a_root_that_makes_no_sense_is_not_written_and_no_key_is_made(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    assert _run("trust", "init", "--out", tmp_path / "k", *words) in (2, 3)
    assert not (tmp_path / "k").exists()


def test_keys_that_are_elsewhere_are_counted_like_those_made(tmp_path: Path) -> None:
    k = tmp_path / "k"
    _init(k, "--release-keys", "3", "--custodians", "3")
    given = [
        word
        for name in ("release-1", "release-2", "release-3", "custodian-1", "custodian-2", "custodian-3")
        for word in ("--public", f"{name.partition('-')[0]}={k / name}.pub")
    ]
    two = ("--public", f"publisher={k / 'publisher.pub'}", "--public", f"publisher={k / 'release-1.pub'}")
    root = _init(tmp_path / "e", *given, *two, "--release-threshold", "3", "--custodian-threshold", "1")
    thresholds = {name: (role.threshold, len(role.keyids)) for name, role in root.roles.items()}
    assert (thresholds["release"], thresholds["custodian"]) == ((3, 3), (1, 3))
    assert thresholds["publisher"] == (1, 2)  # a model has one signer
    assert _run("trust", "init", "--out", tmp_path / "n", *given, "--release-threshold", "4") == 2


def test_a_root_is_shown_to_those_who_are_yet_to_sign_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _init(tmp_path / "k")
    words = ("trust", "init", "--out", tmp_path / "e", "--public", f"root={tmp_path / 'k' / 'root.pub'}")
    made = _json(capsys, *words)
    shown = _json(capsys, "trust", "show", tmp_path / "e" / "root.json")
    assert (shown["complete"], shown["fingerprint"]) == (False, made["fingerprint"])
    assert _run("trust", "show", tmp_path / "e" / "root.json") == 0
    assert "NOT COMPLETE" in capsys.readouterr().out


def test_a_root_over_keys_that_are_elsewhere_is_signed_by_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _init(tmp_path / "hsm")
    key, public = tmp_path / "hsm" / "root.key", tmp_path / "hsm" / "root.pub"
    words = ("trust", "init", "--out", tmp_path / "k", "--public", f"root={public}")
    unsigned = _json(capsys, *words)
    assert (unsigned["complete"], (tmp_path / "k" / "root.key").exists()) == (False, False)
    command = f"openssl pkeyutl -sign -rawin -inkey {key} -in /dev/stdin"
    signed = _json(capsys, "trust", "sign", tmp_path / "k" / "root.json", "--key", public, "--sign-with", command)
    assert signed["complete"]
    assert signed["fingerprint"] == unsigned["fingerprint"]
    assert roots.load(tmp_path / "k" / "root.json").roles["root"].keyids == (_keyid(key),)


def test_authorities_stand_in_the_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(Authority.new("Acme CA").certificate.public_bytes(Encoding.PEM))
    root = _init(tmp_path / "k", "--authority", f"publisher/acme={ca}", "--crl-required", "publisher/acme")
    assert root.roles["publisher/acme"].keyids == ()
    shown = _json(capsys, "trust", "show", tmp_path / "k" / "root.json")["roles"]["publisher/acme"]
    assert (shown["certificate_authorities"], shown["crl_required"]) == (["CN=Acme CA"], True)


def test_rotating_takes_a_key_away_gives_another_and_needs_both_roots_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    k = tmp_path / "k"
    old = _init(k, "--root-keys", "2", "--release-keys", "2")
    _init(tmp_path / "new", "--hybrid")
    words = ("trust", "rotate", "--root", k / "root.json", "--root-key", k / "root-1.key")
    gone = _keyid(k / "release-1.key")
    changes = ("--remove", f"release={gone[:8]}", "--add", f"release={tmp_path / 'new' / 'release.pub'}")
    assert _run(*words, "--hybrid", "release") == 3  # which nobody could sign
    post_quantum = ("--add", f"release={tmp_path / 'new' / 'release-pq.pub'}", "--hybrid", "release")
    first = _json(capsys, *words, *changes, "--threshold", "release=1", *post_quantum)
    assert (first["version"], first["complete"]) == (2, False)
    signing = ("trust", "sign", k / "2.root.json", "--key", k / "root-2.key", "--root", k / "root.json")
    assert _json(capsys, *signing)["complete"]
    new = roots.load(k / "2.root.json")
    assert roots.advance(old, [new]).version == 2
    capsys.readouterr()
    assert _run(*signing[:-2]) == 0
    assert "of its own; whether of the version before, --root tells" in capsys.readouterr().out
    assert gone not in new.roles["release"].keyids
    assert _keyid(tmp_path / "new" / "release.key") in new.roles["release"].keyids
    assert (new.roles["release"].threshold, new.extension.hybrid) == (1, {"release"})
    assert _run(*words, "--remove", f"release={'00' * 32}") == 3
    assert _run(*words) == 1  # 2.root.json is never overwritten


def test_revoking_writes_a_trust_bundle_and_the_next_one_repeats_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    k, first, second = tmp_path / "k", tmp_path / "1.trust", tmp_path / "2.trust"
    ca, crl = Authority.new(), tmp_path / "crl.der"
    (tmp_path / "ca.pem").write_bytes(ca.certificate.public_bytes(Encoding.PEM))
    crl.write_bytes(ca.crl(7))
    root = _init(k, "--authority", f"publisher={tmp_path / 'ca.pem'}")
    words = ("trust", "revoke", "--root", k / "root.json", "--revocation-key", k / "revocation.key")
    release = _keyid(k / "release.key")
    _json(
        capsys,
        *words,
        "--key",
        release,
        "--certificate",
        "0A:FF",
        "--crl",
        crl,
        "--minimum",
        "tiny=4",
        "--out",
        first,
    )
    told = _json(capsys, *words, "--previous", first, "--manifest", DIGEST, "--minimum", "tiny=5", "--out", second)
    assert (told["sequence"], told["complete"]) == (2, True)
    head = read_trust_bundle(second)
    assert [roots.parse(raw).version for raw in head.roots] == [1]
    found = revocation.verify(head.revocation or b"", root)
    assert (found.keys, found.manifests, found.minimum_sequences) == ({release}, {DIGEST}, {"tiny": 5})
    assert [entry.serial for entry in found.document.certificates] == ["aff"]
    assert len(found.crls) == 1
    assert second.stat().st_size < 16 * 1024
    shown = _json(capsys, "trust", "show", second)
    assert shown["revocations"]["keys"] == [release]
    assert _run(*words, "--previous", second, "--minimum", "tiny=4", "--out", first) == 2
    assert _run(*words, "--key", _keyid(k / "root.key"), "--out", first) == 2


def test_what_is_repeated_was_signed_as_a_given_root_demands(tmp_path: Path) -> None:
    k, thief, first, out = (tmp_path / name for name in ("k", "thief", "1.trust", "2.trust"))
    _init(k)
    _init(thief)
    words = ("trust", "revoke", "--root", k / "root.json", "--revocation-key")
    assert (
        _run(
            "trust",
            "revoke",
            "--root",
            thief / "root.json",
            "--revocation-key",
            thief / "revocation.key",
            "--out",
            first,
        )
        == 0
    )
    forged = read_trust_bundle(first).revocation
    write_trust_bundle(first, [roots.load(k / "root.json")], forged)
    assert _run(*words, k / "revocation.key", "--previous", first, "--out", out) == 3
    assert not out.exists()
    # After a rotation of the role the older root vouches for what goes on.
    assert _run(*words, k / "revocation.key", "--manifest", DIGEST, "--out", first) == 0
    changes = (
        "--add",
        f"revocation={thief / 'revocation.pub'}",
        "--remove",
        f"revocation={_keyid(k / 'revocation.key')}",
    )
    assert _run("trust", "rotate", "--root", k / "root.json", "--root-key", k / "root.key", *changes) == 0
    newer = ("trust", "revoke", "--root", k / "2.root.json", "--revocation-key", thief / "revocation.key")
    assert _run(*newer, "--previous", first, "--out", out) == 3
    assert _run(*newer, "--root", k / "root.json", "--previous", first, "--out", out) == 0
    held = revocation.verify(read_trust_bundle(out).revocation or b"", roots.load(k / "2.root.json"))
    assert (held.sequence, held.manifests) == (2, {DIGEST})


def test_a_list_replaces_its_issuer_s_only_and_does_not_go_back(tmp_path: Path) -> None:
    k, one, other = tmp_path / "k", Authority.new("One CA"), Authority.new("Other CA")
    root = _init(k)
    for name, raw in (
        ("one", one.crl(1)),
        ("other", other.crl(2)),
        ("newer", one.crl(1, 3, issued=NOW)),
        ("older", one.crl(issued=NOW - 9 * DAY)),
        ("delta", one.crl(4, issued=NOW, is_delta=True)),
    ):
        (tmp_path / name).write_bytes(raw)
    words = ("trust", "revoke", "--root", k / "root.json", "--revocation-key", k / "revocation.key")
    first, second = tmp_path / "1.trust", tmp_path / "2.trust"
    assert _run(*words, "--crl", tmp_path / "one", "--crl", tmp_path / "other", "--out", first) == 0
    for refused in ("older", "delta"):
        assert _run(*words, "--previous", first, "--crl", tmp_path / refused, "--out", second) == 2
    assert _run(*words, "--previous", first, "--crl", tmp_path / "newer", "--out", second) == 0
    held = revocation.verify(read_trust_bundle(second).revocation or b"", root).crls
    assert [[entry.serial_number for entry in crl] for crl in held] == [[1, 3], [2]]


def test_what_a_root_says_of_publishers_can_be_taken_back(tmp_path: Path) -> None:
    k, ca, other = tmp_path / "k", tmp_path / "ca.pem", tmp_path / "other.pem"
    for path in (ca, other):
        path.write_bytes(Authority.new(path.stem).certificate.public_bytes(Encoding.PEM))
    acme = ("--authority", f"publisher/acme={ca}", "--authority", f"publisher/acme={other}")
    _init(k, "--hybrid", "--custodians", "1")
    words = ("trust", "rotate", "--root-key", k / "root.key", "--root-key", k / "root-pq.key", "--root")
    assert _run(*words, k / "root.json", *acme, "--crl-required", "publisher/acme") == 0
    gone = [w for name in ("custodian", "custodian-pq") for w in ("--remove", f"custodian={_keyid(k / name)}")]
    fewer = (
        "--remove-authority",
        f"publisher/acme={ca}",
        "--not-hybrid",
        "release",
        "--crl-optional",
        "publisher/acme",
    )
    assert _run(*words, k / "2.root.json", *fewer, *gone) == 0
    third = roots.load(k / "3.root.json")
    assert [held.subject.rfc4514_string() for held in third.extension.authorities["publisher/acme"]] == [
        "CN=other"
    ]
    assert third.extension.hybrid == {"root", "publisher", "revocation"}
    assert third.extension.crl_required == frozenset()
    assert "custodian" not in third.roles
    assert _run(*words, k / "3.root.json", "--remove-authority", f"publisher/acme={ca}") == 3
    assert _run(*words, k / "3.root.json", "--remove-authority", f"publisher/acme={other}") == 0
    assert "publisher/acme" not in roots.load(k / "4.root.json").roles


def test_a_revocation_document_travels_alone_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    k, document, out = tmp_path / "k", tmp_path / "revocation.json", tmp_path / "t"
    _init(k)
    words = ("trust", "revoke", "--root", k / "root.json", "--revocation-key", k / "revocation.key", "--out", out)
    _json(capsys, *words, "--document", document)
    assert document.read_bytes() == read_trust_bundle(out).revocation
    again = ("trust", "bundle", "--root", k / "root.json", "--revocation", document, "--out", tmp_path / "u")
    assert _json(capsys, *again)["revocations"]["sequence"] == 1
    assert _json(capsys, "trust", "show", document)["sequence"] == 1


def test_revocations_that_several_must_sign_are_signed_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    k, out = tmp_path / "k", tmp_path / "t"
    root = _init(k, "--hybrid")
    words = ("trust", "revoke", "--root", k / "root.json", "--revocation-key", k / "revocation.key", "--out", out)
    assert not _json(capsys, *words)["complete"]
    assert len(_json(capsys, "trust", "sign", out, "--key", k / "revocation-pq.key")["signers"]) == 2
    assert revocation.verify(read_trust_bundle(out).revocation or b"", root).sequence == 1


def test_a_trust_bundle_of_roots_alone_brings_a_rotation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    k, out = tmp_path / "k", tmp_path / "t"
    _init(k)
    assert _run("trust", "rotate", "--root", k / "root.json", "--root-key", k / "root.key") == 0
    words = ("trust", "bundle", "--root", k / "root.json", "--root", k / "2.root.json", "--out", out)
    assert _json(capsys, *words)["roots"] == [1, 2]
    assert read_trust_bundle(out).revocation is None


def test_custodians_approve_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    k, out = tmp_path / "k", tmp_path / "a"
    root = _init(k, "--custodians", "2")
    words = ("trust", "approve", DIGEST, "--appliance", "ward-4")
    _json(capsys, *words, "--key", k / "custodian-1.key", "--out", out)
    both = _json(capsys, *words, "--key", k / "custodian-2.key", "--add-to", out)
    assert len(both["signers"]) == 2
    assert verify_approval(out.read_bytes(), root, None, "ward-4").is_complete
    assert _run(*words, "--add-to", out) == 2
    assert _run("trust", "approve", "5E", "--appliance", "ward-4", "--key", k / "custodian-1.key") == 2


def test_a_signing_command_that_fails_writes_nothing(tmp_path: Path) -> None:
    k = tmp_path / "k"
    _init(k, "--custodians", "1")
    failing = ("--key", k / "custodian.pub", "--sign-with", f"{sys.executable} -c 'raise SystemExit(9)'")
    assert _run("trust", "approve", DIGEST, "--appliance", "a", *failing, "--out", tmp_path / "a") == 1
    assert _run("trust", "approve", DIGEST, "--appliance", "a", *failing[:2], "--out", tmp_path / "a") == 2
    assert not (tmp_path / "a").exists()
