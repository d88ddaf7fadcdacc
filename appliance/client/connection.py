"""How a client connects: mutual TLS 1.3, the API key on every call, and what is sent again when."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import grpc

from appliance.client.credentials import Credentials, read_credentials

_RETRYING = {
    "methodConfig": [
        {
            "name": [{"service": "cloister.inference.v1.InferenceService"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.3s",
                "maxBackoff": "3s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_COMMON = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.per_rpc_retry_buffer_size", 4 << 20),
)
# Channel options, with and without sending again. Only UNAVAILABLE is, and only before the first event (gRPC A6).
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
