"""Bad input at the gateway: each kind has its status, its stable code, and leaves nothing behind."""

import shutil
import uuid
from pathlib import Path

import grpc
import pytest

from appliance.client import Client, CloisterError
from tests.e2e.appliance import ALIAS, Appliance, cloister


def refused(client: Client, model: str = ALIAS, **arguments: object) -> CloisterError:
    """The error that one request is refused with."""
    with client, pytest.raises(CloisterError) as error:
        list(client.generate(model, **{"text": "hello", **arguments}))  # type: ignore[arg-type]  # any argument
    return error.value


def with_files(appliance: Appliance, folder: Path, **replaced: bytes) -> Path:
    """A copy of the tenant's credentials with some files replaced."""
    shutil.copytree(appliance.credentials, folder)
    for name, content in replaced.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    return folder


def test_a_certificate_of_another_authority_does_not_get_past_the_handshake(
    appliance: Appliance, tmp_path: Path
) -> None:
    from tests.e2e.foreign import self_signed

    certificate, key = self_signed("spiffe://test/tenant/ward-notes/app/summary")
    folder = with_files(appliance, tmp_path / "c", client_pem=certificate, client_key=key)
    assert refused(Client.from_dir(folder), retry=False).status is grpc.StatusCode.UNAVAILABLE


def test_a_client_without_a_certificate_does_not_get_past_the_handshake(appliance: Appliance) -> None:
    ca = (appliance.credentials / "ca.pem").read_bytes()
    address = (appliance.credentials / "address").read_text().strip()
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(ca)) as channel:
        call = channel.unary_unary("/cloister.inference.v1.InferenceService/ListModels")
        with pytest.raises(grpc.RpcError) as error:
            call(b"", timeout=5)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(("api_key", "code"), [(b"", "API_KEY_MISSING"), (b"clo_nobody_x_0", "API_KEY_INVALID")])
def test_a_certificate_without_its_api_key_is_not_enough(
    appliance: Appliance, tmp_path: Path, api_key: bytes, code: str
) -> None:
    error = refused(Client.from_dir(with_files(appliance, tmp_path / "c", api_key=api_key)))
    assert (error.status, error.code) == (grpc.StatusCode.UNAUTHENTICATED, code)


def test_an_unknown_model_and_one_not_granted_look_the_same(appliance: Appliance) -> None:
    appliance.cloister("alias", "set", "hidden", ALIAS)
    unknown, hidden = (refused(appliance.client(), model=name) for name in ("nothing", "hidden"))
    appliance.cloister("alias", "remove", "hidden")
    assert (unknown.status, unknown.code) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert (hidden.status, hidden.code) == (unknown.status, unknown.code)
    assert hidden.message.replace("hidden", "nothing") == unknown.message


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        ({"text": ""}, grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_PROMPT"),
        ({"text": "word " * 5000}, grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_OVERFLOW"),
        ({"temperature": float("nan")}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SAMPLING"),
        ({"text": "a" * 10_000_000}, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_TOO_LARGE"),
        ({"request_id": "not-a-uuid"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST_ID"),
        ({"stop": ["x"] * 17}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_STOP"),
    ],
)
def test_a_malformed_request_is_refused_by_name(
    appliance: Appliance, arguments: dict[str, object], status: grpc.StatusCode, code: str
) -> None:
    error = refused(appliance.client(), **arguments)
    assert (error.status, error.code) == (status, code)


def test_a_repeated_request_id_is_refused_and_charged_once(appliance: Appliance) -> None:
    request_id = str(uuid.uuid4())

    def used() -> int:
        return int(next(t for t in appliance.json("tenant", "list") if t["name"] == "ward-notes")["tokens_used"])

    with appliance.client() as client:
        list(client.generate(ALIAS, text="hello", request_id=request_id, max_tokens=2))
    before = used()
    error = refused(appliance.client(), request_id=request_id)
    assert (error.status, error.code) == (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST_ID")
    assert used() == before


def test_a_revoked_key_is_refused_at_once(appliance: Appliance, tmp_path: Path) -> None:
    appliance.cloister("key", "issue", "--tenant", "ward-notes", "--app", "leaver", "--out", str(tmp_path / "c"))
    key = next(k for k in appliance.json("key", "list") if k["application"] == "leaver")
    appliance.cloister("key", "revoke", key["key_id"])
    assert refused(Client.from_dir(tmp_path / "c")).status is grpc.StatusCode.UNAUTHENTICATED


def test_the_appliance_that_is_not_there_is_not_reachable(tmp_path: Path) -> None:
    done = cloister("--home", str(tmp_path), "status", expect=4)
    assert "NOT_RUNNING" in done.stderr
