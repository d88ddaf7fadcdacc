"""Dead Simple Signing Envelopes: base64 payload, its type, and signatures over both.

Source: DSSE v1.0.2, protocol.md and envelope.md. The reader of manifests accepts canonical standard base64 only;
OMS signatures come from others and may use either alphabet, as DSSE demands of readers.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bundles.format import strict_json
from bundles.format.errors import BundleError
from bundles.trust.keys import Key
from bundles.trust.signers import Signer

MAX_SIGNATURES = 64
MAX_UNNAMED = 8  # each is tried with every key, over what may be 32 MiB


@dataclass(frozen=True)
class Signature:
    """One signature; `keyid` is a hint and may be empty."""

    keyid: str
    sig: bytes


@dataclass(frozen=True)
class Envelope:
    """A payload with its type and signatures."""

    payload: bytes
    payload_type: str
    signatures: tuple[Signature, ...] = ()

    @property
    def signed_bytes(self) -> bytes:
        """What the signatures are over: DSSE's pre-authentication encoding, version 1."""
        kind = self.payload_type.encode()
        return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(self.payload), self.payload)

    def signed_by(self, signer: Signer) -> "Envelope":
        """This envelope with `signer`'s signature, which replaces an older one of the same key."""
        keyid = signer.key.keyid
        others = tuple(s for s in self.signatures if s.keyid != keyid)
        added = Signature(keyid, signer.sign(self.signed_bytes))
        return Envelope(self.payload, self.payload_type, (*others, added))

    def valid_keys(self, keys: Iterable[Key]) -> tuple[str, ...]:
        """Ids of those `keys` that signed this, each once; a signature that names a key counts for it only."""
        return self._signers(keys, self.signed_bytes)

    def valid_old_keys(self, keys: Iterable[Key]) -> tuple[str, ...]:
        """Like `valid_keys`, over the encoding before DSSE v1: it counts for nothing, but tells why one fails."""
        return self._signers(keys, self.signed_bytes.replace(b"DSSEv1", b"DSSEV1", 1))

    def _signers(self, keys: Iterable[Key], message: bytes) -> tuple[str, ...]:
        valid = [
            key.keyid
            for key in keys
            if any(s.keyid in ("", key.keyid) and key.verifies(s.sig, message) for s in self.signatures)
        ]
        return tuple(dict.fromkeys(valid))

    def encode(self) -> bytes:
        """The envelope as JSON."""
        return json.dumps(self.as_dict(), indent=1).encode() + b"\n"

    def as_dict(self) -> dict[str, object]:
        """The envelope's JSON object."""
        signatures = [{"keyid": s.keyid, "sig": _encode64(s.sig)} for s in self.signatures]
        return {"payload": _encode64(self.payload), "payloadType": self.payload_type, "signatures": signatures}


def parse(raw: bytes, what: str) -> Envelope:
    """The envelope in `raw`, exactly as `encode` could have made it.

    Raises:
        BundleError: ENVELOPE_SCHEMA, BASE64, or a JSON code.
    """
    return from_dict(strict_json.parse_object(raw, what), what)


def from_dict(value: object, what: str, *, foreign: bool = False) -> Envelope:
    """The envelope in a parsed JSON object.

    Args:
        value: the object.
        what: names it in errors.
        foreign: made by others: either base64 alphabet, and key ids that are null and mean nothing.

    Raises:
        BundleError: ENVELOPE_SCHEMA, BASE64.
    """
    match value:
        case {"payload": str(payload), "payloadType": str(kind), "signatures": list(entries), **rest} if not rest:
            signatures = _signatures(entries, what, foreign)
            return Envelope(_decode64(payload, what, foreign), kind, signatures)
    raise BundleError("ENVELOPE_SCHEMA", f"{what} is not a DSSE envelope")


def _signatures(entries: Sequence[object], what: str, foreign: bool) -> tuple[Signature, ...]:
    if len(entries) > MAX_SIGNATURES:
        raise BundleError("ENVELOPE_SCHEMA", f"{what} has over {MAX_SIGNATURES} signatures")
    signatures = []
    for entry in entries:
        match entry:
            case {"sig": str(sig), **rest} if rest.keys() <= {"keyid"} and _is_keyid(
                rest.get("keyid", ""), foreign
            ):
                keyid = "" if foreign else str(rest.get("keyid", ""))
                signatures.append(Signature(keyid, _decode64(sig, what, foreign)))
            case _:
                raise BundleError("ENVELOPE_SCHEMA", f"{what} has a signature of unknown form")
    if sum(not signature.keyid for signature in signatures) > MAX_UNNAMED:
        raise BundleError("ENVELOPE_SCHEMA", f"{what} has over {MAX_UNNAMED} signatures that name no key")
    return tuple(signatures)


def _is_keyid(value: object, foreign: bool) -> bool:
    return isinstance(value, str) or (foreign and value is None)


def _encode64(raw: bytes) -> str:
    return base64.standard_b64encode(raw).decode()


def _decode64(text: str, what: str, either_alphabet: bool) -> bytes:
    standard = text.translate(str.maketrans("-_", "+/")) if either_alphabet else text
    try:
        raw = base64.b64decode(standard, validate=True)
    except (binascii.Error, ValueError):
        raise BundleError("BASE64", f"{what} has bytes that are not base64") from None
    if not either_alphabet and _encode64(raw) != text:
        raise BundleError("BASE64", f"{what} has base64 that is not in its one legal form")
    return raw
