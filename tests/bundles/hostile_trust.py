"""Refusals 1 to 28: signatures, keys, certificates, trust roots, time, order and mixtures."""

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives.asymmetric import mldsa

from bundles.importer.workplace import Workplace
from tests.bundles.attacks import Attack, Refusal, Scene, end_of, manifest
from tests.bundles.forging import (
    RELEASE_TYPE,
    STATEMENT_TYPE,
    Draft,
    Fields,
    Keyholder,
    b64,
    encoded,
    flipped,
    oms_signature,
    pae,
    time_text,
)


def _signatures(bundle: Draft) -> list[Fields]:
    return list(json.loads(bundle["manifest.dsse.json"])["signatures"])


def _payload_flipped(scene: Scene) -> Draft:
    raw = scene.good.payload
    changed = flipped(raw, raw.index(b"tiny"))
    return scene.good.enveloped(lambda value: value.update(payload=b64(changed)))


def _signature_flipped(scene: Scene) -> Draft:
    def change(value: Fields) -> None:
        first = value["signatures"][0]
        first["sig"] = b64(flipped(base64.b64decode(first["sig"]), 40))

    return scene.good.enveloped(change)


def _only_signature_flipped(scene: Scene) -> Draft:
    """The publisher's one signature, in its r: the release keys signed the rest as it is."""
    document = json.loads(scene.good["oms.sig"])
    signature = document["dsseEnvelope"]["signatures"][0]
    signature["sig"] = b64(flipped(base64.b64decode(signature["sig"]), 20))
    return scene.good.published(encoded(document))


def _statement_flipped(scene: Scene) -> Draft:
    document = json.loads(scene.good["oms.sig"])
    raw = base64.b64decode(document["dsseEnvelope"]["payload"])
    document["dsseEnvelope"]["payload"] = b64(raw.replace(b'"tiny"', b'"tinz"'))
    return scene.good.published(encoded(document))


def _signed_over(scene: Scene, message: bytes, kind: str = RELEASE_TYPE) -> Draft:
    """The manifest with release signatures over other bytes than DSSE v1 wants."""
    signatures = [{"keyid": key.keyid, "sig": b64(key.sign(message))} for key in scene.good.signers]
    return scene.good.enveloped(lambda value: value.update(signatures=signatures, payloadType=kind))


def _old_encoding(scene: Scene) -> Draft:
    return _signed_over(scene, pae(RELEASE_TYPE, scene.good.payload).replace(b"DSSEv1", b"DSSEV1", 1))


def _old_publisher_encoding(scene: Scene) -> Draft:
    statement = encoded(scene.good.statement())
    document = oms_signature(statement, scene.keys.publisher)
    message = pae(STATEMENT_TYPE, statement).replace(b"DSSEv1", b"DSSEV1", 1)
    document["dsseEnvelope"]["signatures"][0]["sig"] = b64(scene.keys.publisher.sign(message))
    return scene.good.published(encoded(document))


def _twice(scene: Scene) -> Draft:
    first = _signatures(scene.good)[0]
    return scene.good.enveloped(lambda value: value.update(signatures=[first, first]))


def _key_listed_twice(signed: Fields) -> None:
    """One key under its own id and under another, in a role that then seems to have two."""
    release = signed["roles"]["release"]["keyids"]
    signed["keys"]["f" * 64] = signed["keys"][release[0]]
    release[1] = "f" * 64


def _key_called_otherwise(signed: Fields) -> None:
    release = signed["roles"]["release"]["keyids"]
    signed["keys"]["f" * 64] = signed["keys"].pop(release[0])
    release[0] = "f" * 64


def _named_otherwise(scene: Scene) -> Draft:
    sig = b64(scene.keys.stranger.sign(pae(RELEASE_TYPE, scene.good.payload)))
    signatures = [{"keyid": key.keyid, "sig": sig} for key in scene.good.signers]
    return scene.good.enveloped(lambda value: value.update(signatures=signatures))


def _hybrid(scene: Scene, signers: slice) -> Draft:
    classical, quantum = Keyholder.ed25519(), Keyholder(mldsa.MLDSA65PrivateKey.generate())
    both = (classical, quantum)
    root = scene.keys.root_document(
        2, lambda signed: signed.update({"x-cloister": {"hybrid": ["release"]}}), release=(both, 1)
    )
    return scene.good.with_root(root).signed_by(*both[signers])


def _two_days_behind(place: Workplace) -> Workplace:
    return replace(place, now=lambda: datetime.now(UTC) - timedelta(days=2))


def _issued_long_ago(fields: Fields) -> None:
    fields.update(issued_at=time_text(-9), not_before=time_text(-9))


def _mixed_end(scene: Scene) -> Draft:
    return scene.good.put("end.json", scene.base["end.json"])


def _mixed_header(scene: Scene) -> Draft:
    return scene.good.put("header.json", scene.base["header.json"])


SIGNATURES = (
    Refusal(1, "no signature", "SIGNATURE_MISSING", lambda s: s.good.signed_by()),
    Refusal(1, "no publisher's signature", "OMS_MISSING", lambda s: s.good.without("oms.sig")),
    Refusal(2, "a bit flipped in the manifest", "SIGNATURE_INVALID", _payload_flipped),
    Refusal(2, "a bit flipped in the publisher's statement", "OMS_SIGNATURE", _statement_flipped),
    Refusal(3, "a bit flipped in one of two signatures", "SIGNATURE_DAMAGED", _signature_flipped),
    Refusal(3, "a bit flipped in the publisher's signature", "OMS_SIGNATURE", _only_signature_flipped),
    Refusal(4, "an unknown key", "SIGNATURE_UNKNOWN_KEY", lambda s: s.good.signed_by(s.keys.stranger)),
    Refusal(
        4,
        "an unknown publisher",
        "OMS_UNKNOWN_KEY",
        lambda s: s.good.with_oms(s.good.statement(), Keyholder.ecdsa()),
    ),
    Refusal(5, "below the threshold", "SIGNATURE_THRESHOLD", lambda s: s.good.signed_by(s.keys.release[0])),
    Refusal(
        5,
        "below the threshold with strangers",
        "SIGNATURE_THRESHOLD",
        lambda s: s.good.signed_by(s.keys.release[0], s.keys.stranger, s.keys.root),
    ),
    Refusal(6, "one key counted twice", "SIGNATURE_DUPLICATE", _twice),
    Refusal(
        7,
        "one key under two ids",
        "ROOT_KEY_DUPLICATE",
        lambda s: s.good.with_root(s.keys.root_document(2, _key_listed_twice)),
    ),
    Refusal(
        8,
        "an id that is not its key's",
        "ROOT_KEYID",
        lambda s: s.good.with_root(s.keys.root_document(2, _key_called_otherwise)),
    ),
    Refusal(8, "a stranger's signatures under the ids of release keys", "SIGNATURE_INVALID", _named_otherwise),
    Refusal(
        9,
        "keys of other roles",
        "SIGNATURE_WRONG_ROLE",
        lambda s: s.good.signed_by(s.keys.root, s.keys.publisher, s.keys.revocation),
    ),
    Refusal(10, "no post-quantum signature", "PQ_SIGNATURE_MISSING", lambda s: _hybrid(s, slice(0, 1))),
    Refusal(10, "no classical signature", "CLASSICAL_SIGNATURE_MISSING", lambda s: _hybrid(s, slice(1, 2))),
    Refusal(
        11,
        "another payload type",
        "PAYLOAD_TYPE",
        lambda s: _signed_over(s, pae("application/json", s.good.payload), "application/json"),
    ),
    Refusal(12, "encoded as before DSSE v1", "SIGNATURE_ENCODING", _old_encoding),
    Refusal(12, "encoded as before OMS v1.0", "SIGNATURE_ENCODING", _old_publisher_encoding),
)

ROOTS = (
    Refusal(
        19,
        "a root version skipped",
        "ROOT_SKIPPED",
        lambda s: s.good.with_root(s.keys.root_document(3)),
    ),
    Refusal(
        20,
        "another root of the same version",
        "ROOT_FORKED",
        lambda s: s.good.put(
            "trust/1.root.json", s.keys.root_document(1, lambda signed: signed.update(expires=time_text(9)))
        ),
    ),
    Refusal(
        20,
        "a root that the old keys did not sign",
        "ROOT_NOT_SIGNED_BY_OLD",
        lambda s: s.good.with_root(
            s.keys.root_document(2, signers=[s.keys.stranger], root=([s.keys.stranger], 1))
        ),
    ),
)

POLICY = (
    Refusal(21, "another product", "WRONG_PRODUCT", manifest(lambda m: m.update(product="other"))),
    Refusal(21, "another appliance", "WRONG_TARGET", manifest(lambda m: m.update(targets=["elsewhere"]))),
    Refusal(22, "a sequence below the floor", "ROLLBACK_REFUSED", manifest(lambda m: m.update(sequence=4))),
    Refusal(23, "the floor's sequence again", "SEQUENCE_REUSED", manifest(lambda m: m.update(sequence=5))),
    Refusal(
        24,
        "a sequence that leaves no room for another",
        "SEQUENCE_FAST_FORWARD",
        manifest(lambda m: m.update(sequence=2**53 - 1)),
    ),
    Refusal(24, "a sequence of 2^63", "JSON_INTEGER", manifest(lambda m: m.update(sequence=2**63))),
    Refusal(25, "expired", "BUNDLE_EXPIRED", manifest(lambda m: m.update(expires=time_text(-1)))),
    Refusal(
        26,
        "a clock behind the newest release",
        "CLOCK_BEHIND",
        lambda s: Attack(s.write(s.good.described(_issued_long_ago)), site=_two_days_behind),
    ),
    Refusal(27, "the end of another bundle", "BUNDLE_MIXED", _mixed_end, early=False),
    Refusal(27, "the beginning of another bundle", "BUNDLE_MIXED", _mixed_header, early=False),
    Refusal(
        27,
        "another number of chunks",
        "BUNDLE_MIXED",
        lambda s: s.good.put("end.json", end_of(s.good, chunks=1)),
        early=False,
    ),
    Refusal(28, "a delta to what is not here", "BASE_ABSENT", manifest(lambda m: m.update(base="0" * 64))),
)
