"""The trust root: keys named by what they are, thresholds honoured, a chain without gaps."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bundles.format.errors import BundleError
from bundles.trust import keys, roots
from bundles.trust.keys import Key, canonical_json
from bundles.trust.signers import FileSigner, PrivateSigner, new_signer
from tests.bundles.making import Trust, make_root


def _new() -> PrivateSigner:
    return new_signer("ed25519")


def _roles(**given: list[PrivateSigner]) -> dict[str, list[PrivateSigner]]:
    return {"root": [_new()], "release": [_new()], "publisher": [_new()]} | given


def _changed(raw: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    document = json.loads(raw)
    change(document)
    return json.dumps(document).encode()


def test_a_root_survives_being_written_and_read(trust: Trust) -> None:
    root = roots.parse(trust.root.raw)
    assert root.version == 1
    assert root.roles["release"].keyids == (trust.release_key.key.keyid,)
    assert [key.scheme for key in root.role_keys("publisher")] == ["ecdsa-sha2-nistp384"]


def test_canonical_json_is_sorted_bare_and_escapes_two_characters_only() -> None:
    assert canonical_json({"b": [1, True, None], "a": 'x"\\\n'}) == b'{"a":"x\\"\\\\\n","b":[1,true,null]}'
    with pytest.raises(BundleError, match="JSON_FLOAT"):
        canonical_json(1.5)


def test_a_signature_has_one_way_to_be_written(trust: Trust) -> None:
    def shout(document: dict[str, Any]) -> None:
        document["signatures"][0]["sig"] = document["signatures"][0]["sig"].upper()

    with pytest.raises(BundleError, match="ROOT_SCHEMA"):
        roots.parse(_changed(trust.root.raw, shout))


def _lie_about_a_key(document: dict[str, Any]) -> None:
    listed = document["signed"]["keys"]
    keyid = next(iter(listed))
    listed["0" * 64] = listed.pop(keyid)


def _same_key_with_another_text(document: dict[str, Any]) -> None:
    listed = document["signed"]["keys"]
    entry = next(e for e in listed.values() if e["keytype"] == "ecdsa")
    entry["keyval"]["public"] += "\n"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_lie_about_a_key, "ROOT_KEYID"),
        (_same_key_with_another_text, "KEY_UNSUPPORTED"),
        (lambda d: d["signed"].update(version=2), "ROOT_THRESHOLD"),
        (lambda d: d["signatures"].clear(), "ROOT_THRESHOLD"),
        (lambda d: d["signed"]["roles"].pop("release"), "ROOT_SCHEMA"),
        (lambda d: d["signed"]["roles"]["root"].update(threshold=0), "ROOT_SCHEMA"),
        (lambda d: d["signed"]["roles"]["root"].update(threshold=True), "ROOT_SCHEMA"),
        (lambda d: d["signed"]["roles"]["root"].update(threshold=2), "ROOT_SCHEMA"),
        (lambda d: d["signed"]["roles"]["root"]["keyids"].append("f" * 64), "ROOT_SCHEMA"),
        (lambda d: d["signed"].update(extra=1), "ROOT_SCHEMA"),
        (lambda d: d["signed"].update(_type="targets"), "ROOT_SCHEMA"),
        (lambda d: d["signed"].update(version=0), "ROOT_SCHEMA"),
        (lambda d: d["signed"].update(expires="tomorrow"), "ROOT_SCHEMA"),
        (lambda d: d["signatures"][0].update(sig="zz"), "ROOT_SCHEMA"),
    ],
)
def test_a_changed_root_is_refused_by_name(
    trust: Trust, change: Callable[[dict[str, Any]], None], code: str
) -> None:
    with pytest.raises(BundleError) as error:
        roots.parse(_changed(trust.root.raw, change))
    assert error.value.code == code


def test_one_signature_twice_is_one_signature() -> None:
    first, second = _new(), _new()
    with pytest.raises(BundleError, match="ROOT_THRESHOLD"):
        make_root(1, _roles(root=[first, second]), {"root": 2}, signed_by=[first, first])
    assert make_root(1, _roles(root=[first, second]), {"root": 2}, signed_by=[first, second]).version == 1


def test_a_root_follows_only_when_old_and_new_keys_signed_it() -> None:
    old, new = _new(), _new()
    first = make_root(1, _roles(root=[old]))
    second = make_root(2, _roles(root=[new]), signed_by=[old, new])
    assert roots.advance(first, [second]) is second
    usurper = make_root(2, _roles(root=[new]), signed_by=[new])
    with pytest.raises(BundleError, match="ROOT_NOT_SIGNED_BY_OLD"):
        roots.advance(first, [usurper])


def test_a_skipped_or_forked_version_is_refused_and_an_older_one_changes_nothing() -> None:
    key = _new()
    first, second, third = (make_root(n, _roles(root=[key])) for n in (1, 2, 3))
    with pytest.raises(BundleError, match="ROOT_SKIPPED"):
        roots.advance(first, [third])
    with pytest.raises(BundleError, match="ROOT_FORKED"):
        roots.advance(first, [make_root(1, _roles(root=[key]))])
    assert roots.advance(second, [first]) is second
    assert roots.advance(first, [third, second]) is third


def test_the_pinned_root_is_the_end_of_the_chain_in_the_trust_folder(tmp_path: Path) -> None:
    key = _new()
    with pytest.raises(BundleError, match="ROOT_MISSING"):
        roots.load_pinned(tmp_path)
    for version in (1, 2):
        (tmp_path / f"{version}.root.json").write_bytes(make_root(version, _roles(root=[key])).raw)
    assert roots.load_pinned(tmp_path).version == 2
    (tmp_path / "3.root.json").write_bytes(make_root(3, _roles()).raw)
    with pytest.raises(BundleError, match="ROOT_NOT_SIGNED_BY_OLD"):
        roots.load_pinned(tmp_path)


def test_an_expired_root_is_refused() -> None:
    root = make_root(1, _roles(), days=1)
    root.check_fresh(datetime.now(UTC))
    with pytest.raises(BundleError, match="ROOT_EXPIRED"):
        root.check_fresh(datetime.now(UTC) + timedelta(days=2))


@pytest.mark.parametrize("scheme", keys.SCHEMES)
def test_a_key_verifies_its_own_signature_of_the_same_message_only(tmp_path: Path, scheme: keys.Scheme) -> None:
    private = new_signer(scheme)
    keys.save_private_key(private.private, tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    key = FileSigner(tmp_path / "key").key
    assert key == Key.from_dict(key.as_dict())
    signature = private.sign(b"message")
    assert key.verifies(signature, b"message")
    assert not key.verifies(signature, b"massage")
    assert not _new().key.verifies(signature, b"message")
    with pytest.raises(FileExistsError):
        keys.save_private_key(private.private, tmp_path / "key")


def test_a_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("not a key")
    for name in ("key", "absent"):
        with pytest.raises(BundleError, match="KEY_UNREADABLE"):
            keys.load_private_key(tmp_path / name)


def test_of_a_chain_only_the_last_may_not_be_expired() -> None:
    key = _new()
    first, second = make_root(1, _roles(root=[key]), days=-9), make_root(2, _roles(root=[key]))
    roots.advance(first, [second]).check_fresh(datetime.now(UTC))
    with pytest.raises(BundleError, match="ROOT_EXPIRED"):
        roots.advance(first, []).check_fresh(datetime.now(UTC))


@pytest.mark.parametrize("name", ["custodians", "publisher/", "publisher/A", "publisher/../x", "timestamp", ""])
def test_a_role_that_is_unknown_here_is_refused(name: str) -> None:
    with pytest.raises(BundleError, match="ROOT_SCHEMA"):
        make_root(1, {**_roles(), name: [_new()]})


def test_every_optional_role_may_be_there() -> None:
    named = ["custodian", "revocation", "site-publisher", "publisher/acme.2"]
    assert set(named) < make_root(1, {**_roles(), **{name: [_new()] for name in named}}).roles.keys()


@pytest.mark.parametrize("version", ["1", "1.0.34.1", "2.0.0", "1.x", 1, ""])
def test_only_tuf_1_is_read(trust: Trust, version: object) -> None:
    with pytest.raises(BundleError, match="ROOT_SCHEMA"):
        roots.parse(_changed(trust.root.raw, lambda d: d["signed"].update(spec_version=version)))


def test_signatures_are_added_one_after_the_other_and_the_fingerprint_stays() -> None:
    first, second = _new(), _new()
    signed = roots.make(
        1,
        datetime.now(UTC) + timedelta(days=1),
        {role: [signer.key for signer in held] for role, held in _roles(root=[first, second]).items()},
        {"root": 2},
    )
    raw = roots.sign_root(signed, [first])
    assert roots.read(raw).version == 1
    with pytest.raises(BundleError, match="ROOT_THRESHOLD"):
        roots.parse(raw)
    both = roots.add_signature(roots.add_signature(raw, second), second)
    assert roots.parse(both).version == 1
    assert len(json.loads(both)["signatures"]) == 2
    assert roots.fingerprint(both) == roots.fingerprint(raw)
