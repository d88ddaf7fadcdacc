"""How a client connects: mutual TLS 1.3, the API key on every call, and what is sent again when."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import grpc

from appliance.client.credentials import Credentials, read_credentials

_SERVICE = "cloister.inference.v1.InferenceService"


def _sent_again(methods: tuple[str, ...], statuses: tuple[str, ...]) -> dict[str, object]:
    """The config of methods that are sent again after `statuses`: four times, as often as gRPC ever does."""
    return {
        "name": [{"service": _SERVICE, **({"method": method} if method else {})} for method in methods],
        "retryPolicy": {
            "maxAttempts": 5,
            "initialBackoff": "0.3s",
            "maxBackoff": "3s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": list(statuses),
        },
    }


# A request is sent again only where nobody has begun on it. What costs nothing and changes nothing is also sent
# again when the tenant has too much on its way at the moment. The appliance's word on when, or that not at all,
# comes before these times (grpc-retry-pushback-ms); the call's deadline ends it all. After the first message of an
# answer nothing is sent again.
# Source: gRPC proposal A6, client retries.
_RETRYING = {
    "methodConfig": [
        _sent_again(("",), ("UNAVAILABLE",)),
        _sent_again(("Tokenize", "Detokenize", "ListModels"), ("UNAVAILABLE", "RESOURCE_EXHAUSTED")),
    ]
}
_COMMON = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.per_rpc_retry_buffer_size", 4 << 20),
    ("grpc.max_receive_message_length", 32 << 20),  # twice what 256 vectors of 16,384 numbers take
)
# Channel options, with and without sending again.
OPTIONS = MappingProxyType(
    {
        True: (*_COMMON, ("grpc.enable_retries", 1), ("grpc.service_config", json.dumps(_RETRYING))),
        False: (*_COMMON, ("grpc.enable_retries", 0)),
    }
)


@dataclass(frozen=True, slots=True, repr=False)
class Connection:
    """Where the appliance is, and what identifies the application there; never shown, never logged.

    Attributes:
        address: host:port of the gateway.
        credentials: for the TLS channel.
        metadata: of every call.
    """

    address: str
    credentials: grpc.ChannelCredentials
    metadata: tuple[tuple[str, str], ...]


def connection(address: str, ca: bytes, certificate: bytes, key: bytes, api_key: str) -> Connection:
    """A connection made from PEM bytes and the API key."""
    metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
    return Connection(address, grpc.ssl_channel_credentials(ca, key, certificate), metadata)


def connection_from(directory: Path | str, address: str | None) -> Connection:
    """A connection made from the directory that `cloister key issue --out DIR` wrote.

    Raises:
        CloisterError: CREDENTIALS_MISSING, or ADDRESS_MISSING.
    """
    found: Credentials = read_credentials(Path(directory), address)
    return connection(found.address, found.ca, found.certificate, found.key, found.api_key)
