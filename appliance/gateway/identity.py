"""Who is calling, as the TLS handshake and the metadata say; whether they may is control's to answer.

Source: SPIFFE X.509-SVID section 2 (exactly one URI SAN); RFC 6750 section 2.1 (Bearer).
"""

import hashlib
import re
import ssl
from collections.abc import Mapping
from typing import Any

import grpc

from appliance.errors import CloisterError
from appliance.protos import control_pb2

_MAX_IDENTITY_BYTES = 2048
_API_KEY = re.compile(r"(?i:bearer) +([\x21-\x7e]{1,512})")


def caller_of(context: "grpc.aio.ServicerContext[Any, Any]") -> control_pb2.Caller:
    """What there is to know about the caller; a field that is missing or ambiguous is empty."""
    peer = context.auth_context()
    identities = _values(peer, "peer_uri")
    unique = len(identities) == 1 and identities[0].startswith(b"spiffe://")
    return control_pb2.Caller(
        identity=_text(identities[0]) if unique else "",
        certificate_sha256=_fingerprint(peer),
        api_key=_api_key(context),
    )


def check_caller(caller: control_pb2.Caller, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
    """Refuse a caller that cannot be told apart from others.

    Raises:
        CloisterError: TLS_TOO_OLD, AMBIGUOUS_IDENTITY or API_KEY_MISSING; all UNAUTHENTICATED.
    """
    if _values(context.auth_context(), "ssl_tls_version") != [b"TLSv1.3"]:
        raise _unauthenticated("TLS_TOO_OLD", "the connection is not TLS 1.3; use a client that speaks it")
    if not caller.identity or not caller.certificate_sha256:
        raise _unauthenticated(
            "AMBIGUOUS_IDENTITY",
            "the client certificate must have exactly one URI name, spiffe://SITE/tenant/T/app/A; "
            "use the one written by `cloister key issue`",
        )
    if not caller.api_key:
        raise _unauthenticated(
            "API_KEY_MISSING", "no API key; send it in the metadata as `authorization: Bearer KEY`"
        )


def _unauthenticated(code: str, message: str) -> CloisterError:
    return CloisterError(code, message, grpc.StatusCode.UNAUTHENTICATED)


def _values(peer: Mapping[str, Any], name: str) -> list[bytes]:
    return list(peer.get(name, ()))


def _text(identity: bytes) -> str:
    """A URI is ASCII; anything else, or one too long to be meant, is no identity."""
    return identity.decode() if identity.isascii() and len(identity) <= _MAX_IDENTITY_BYTES else ""


def _fingerprint(peer: Mapping[str, Any]) -> bytes:
    """SHA-256 of the leaf certificate's DER; empty without a certificate."""
    certificates = _values(peer, "x509_pem_cert")
    if len(certificates) != 1:
        return b""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificates[0].decode())).digest()


def _api_key(context: "grpc.aio.ServicerContext[Any, Any]") -> str:
    """The key of the one `authorization` header; empty when there is none, several, or not a Bearer key."""
    headers = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    match = _API_KEY.fullmatch(headers[0]) if len(headers) == 1 and isinstance(headers[0], str) else None
    return match[1] if match else ""
