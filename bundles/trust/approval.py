"""A second person's consent: custodians sign that a model version may run on one appliance.

Source: docs/trust.md.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bundles.format import strict_json
from bundles.format.errors import BundleError
from bundles.format.manifest import Digest, Target, Time, format_time
from bundles.trust import dsse, roles
from bundles.trust.revocation import Revocations
from bundles.trust.roots import CUSTODIAN, Root, check_hybrid
from bundles.trust.signers import Signer

PAYLOAD_TYPE = "application/vnd.cloister.approval.v1+json"
MAX_APPROVAL = 1024 * 1024
_WHAT = "the approval"


class Statement(BaseModel):
    """What custodians sign."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    schema_: Annotated[Literal["cloister.approval/1"], Field(alias="schema")]
    model_digest: Digest
    appliance: Target
    issued_at: Time

    def encode(self) -> bytes:
        """The bytes to sign."""
        return self.model_dump_json(by_alias=True, indent=1).encode()


@dataclass(frozen=True)
class Approval:
    """An approval whose signatures were checked; complete when as many signed as must.

    Attributes:
        model_digest: SHA-256 of the signed manifest, hex.
        custodians: ids of the custodians' keys that count, each once.
        threshold: how many must sign.
    """

    model_digest: str
    custodians: tuple[str, ...]
    threshold: int

    @property
    def is_complete(self) -> bool:
        """Whether enough custodians signed."""
        return len(self.custodians) >= self.threshold


def approve(model_digest: str, appliance: str, signer: Signer, earlier: bytes | None = None) -> bytes:
    """A statement that approves a model version, or an earlier one with one more signature.

    Raises:
        BundleError: APPROVAL_SCHEMA, APPROVAL_DIFFERS (the earlier one approves something else), SIGNER_FAILED.
    """
    if earlier is None:
        try:
            statement = Statement.model_validate(
                {
                    "schema": "cloister.approval/1",
                    "model_digest": model_digest,
                    "appliance": appliance,
                    "issued_at": format_time(datetime.now(UTC)),
                }
            )
        except ValidationError:
            raise BundleError(
                "APPROVAL_SCHEMA", "an approval names a manifest by 64 hex digits and an appliance by its name"
            ) from None
        envelope = dsse.Envelope(statement.encode(), PAYLOAD_TYPE)
    else:
        envelope = _open(earlier)
        statement = read_statement(earlier)
        if (statement.model_digest, statement.appliance) != (model_digest, appliance):
            raise BundleError(
                "APPROVAL_DIFFERS", f"the earlier statement is about another model or for {statement.appliance!a}"
            )
    return envelope.signed_by(signer).encode()


def read_statement(raw: bytes) -> Statement:
    """What an approval says; whoever signed it.

    Raises:
        BundleError: APPROVAL_SCHEMA, PAYLOAD_TYPE, ENVELOPE_SCHEMA, BASE64, or a JSON code.
    """
    value = strict_json.parse_object(_open(raw).payload, _WHAT)
    try:
        return Statement.model_validate_json(json.dumps(value))
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_url=False, include_input=False)[0]["loc"]))
        raise BundleError("APPROVAL_SCHEMA", f"{_WHAT}'s {where or 'whole'} is not as it must be") from None


def verify_approval(raw: bytes, root: Root, revocations: Revocations | None, appliance: str) -> Approval:
    """Who approved what, for this appliance; fewer than must is no error, another may add a signature.

    Raises:
        BundleError: as `read_statement`; WRONG_TARGET, ROLE_ABSENT (the root has no custodians), KEY_REVOKED, the
            SIGNATURE codes; PQ_SIGNATURE_MISSING and CLASSICAL_SIGNATURE_MISSING where enough signed.
    """
    statement = read_statement(raw)
    if statement.appliance != appliance:
        raise BundleError(
            "WRONG_TARGET", f"{_WHAT} is for the appliance {statement.appliance!a}, this is {appliance!a}"
        )
    revoked: Collection[str] = revocations.keys if revocations else frozenset()
    custodians = roles.count(_open(raw), root, CUSTODIAN, _WHAT, revoked)
    approval = Approval(statement.model_digest, custodians, root.roles[CUSTODIAN].threshold)
    if approval.is_complete and CUSTODIAN in root.extension.hybrid:
        check_hybrid((root.keys[keyid] for keyid in custodians), _WHAT)
    return approval


def _open(raw: bytes) -> dsse.Envelope:
    if len(raw) > MAX_APPROVAL:
        raise BundleError("APPROVAL_SCHEMA", f"{_WHAT} has over {MAX_APPROVAL} bytes")
    envelope = dsse.parse(raw, _WHAT)
    if envelope.payload_type != PAYLOAD_TYPE:
        raise BundleError("PAYLOAD_TYPE", f"{_WHAT} is a {envelope.payload_type[:80]!a}")
    return envelope
