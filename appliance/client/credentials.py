"""The directory that identifies one application to the appliance, as `cloister key issue --out DIR` writes it."""

import os
from dataclasses import dataclass
from pathlib import Path

import grpc

from appliance.errors import CloisterError

CA, CERTIFICATE, KEY, API_KEY, ADDRESS = "ca.pem", "client.pem", "client.key", "api.key", "address"
PROTO, EXAMPLE, README = "inference.proto", "example.py", "README"
FILES = (CA, CERTIFICATE, KEY, API_KEY, ADDRESS, PROTO, EXAMPLE, README)
_PROTO_SOURCE = Path(__file__).parents[1] / "protos" / "cloister" / "inference" / "v1" / "inference.proto"

_EXAMPLE_TEXT = '''"""Asks the first model that answers chats one question, and prints the answer as it comes."""

from pathlib import Path

from appliance.client import Client

with Client.from_dir(Path(__file__).parent) as client:
    model = next(model for model in client.list_models() if model.ready and "chat" in model.capabilities)
    question = "Patient Ada Okafor, bed 12, allergic to penicillin. Summarise."
    stream = client.chat(model.name, [{"role": "user", "content": question}], temperature=0, max_tokens=48)
    for text in stream:
        print(text, end="", flush=True)
    print(f"\\n{stream.usage.completion_tokens} tokens; record {stream.receipt.audit_sequence} of the audit log")
'''

_README_TEXT = """What is here identifies one application to one Cloister appliance.
client.key and api.key are secrets.

ca.pem           the authority that signed the appliance's certificate
client.pem       the application's certificate
client.key       its private key; made here, never sent anywhere
api.key          its API key, sent as metadata `authorization: Bearer KEY`
address          host:port of the appliance
inference.proto  the API
example.py       python example.py

Another language, or Python without Cloister's client: compile the API with your own tools, for example
    python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. inference.proto
and open a TLS channel with ca.pem, client.pem and client.key.
"""


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """The contents of such a directory; never shown, never logged.

    Attributes:
        address: host:port of the gateway.
        ca: PEM of the authority that signed the gateway's certificate.
        certificate: PEM of the application's certificate.
        key: PEM of its private key.
        api_key: its API key.
    """

    address: str
    ca: bytes
    certificate: bytes
    key: bytes
    api_key: str


def read_credentials(directory: Path, address: str | None = None) -> Credentials:
    """Read the directory; `address`, when given, takes the place of the one in it.

    Raises:
        CloisterError: CREDENTIALS_MISSING or ADDRESS_MISSING.
    """
    try:
        ca, certificate, key = ((directory / name).read_bytes() for name in (CA, CERTIFICATE, KEY))
        api_key = (directory / API_KEY).read_text().strip()
        found = address or (directory / ADDRESS).read_text().strip()
    except OSError as error:
        raise CloisterError(
            "CREDENTIALS_MISSING",
            f"cannot read {error.filename}: {error.strerror}; make the directory with "
            "`cloister key issue --out DIR`",
            grpc.StatusCode.FAILED_PRECONDITION,
        ) from None
    if not found:
        raise CloisterError(
            "ADDRESS_MISSING",
            f"{directory / ADDRESS} is empty, because the gateway was not up when the key was issued; "
            "write host:port there",
            grpc.StatusCode.FAILED_PRECONDITION,
        )
    return Credentials(found, ca, certificate, key, api_key)


def check_vacant(directory: Path) -> None:
    """Refuse a directory that already holds credentials; ask before a key is issued, since it is shown only once.

    Raises:
        CloisterError: CREDENTIALS_EXIST.
    """
    there = [name for name in FILES if (directory / name).exists()]
    if there:
        raise CloisterError(
            "CREDENTIALS_EXIST",
            f"{directory} already has {', '.join(there)}; name another directory",
            grpc.StatusCode.ALREADY_EXISTS,
        )


def write_credentials(directory: Path, credentials: Credentials) -> None:
    """Write the directory (0700; the two secrets 0600), with the API's proto and an example that runs as it is.

    Raises:
        CloisterError: CREDENTIALS_EXIST.
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_vacant(directory)
    _write(directory / KEY, credentials.key, 0o600)
    _write(directory / API_KEY, credentials.api_key.encode() + b"\n", 0o600)
    _write(directory / CA, credentials.ca)
    _write(directory / CERTIFICATE, credentials.certificate)
    _write(directory / ADDRESS, credentials.address.encode() + b"\n")
    _write(directory / PROTO, _PROTO_SOURCE.read_bytes())
    _write(directory / EXAMPLE, _EXAMPLE_TEXT.encode())
    _write(directory / README, _README_TEXT.encode())


def _write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """A new file, with its mode from the first moment on; one that is there, or a link, is an error."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
