"""The tenant's client: light, typed, and honest about what the stream has brought."""

import asyncio
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from appliance.client import AsyncClient, Client, CloisterError
from appliance.client.credentials import Credentials, check_vacant, read_credentials, write_credentials
from appliance.client.enrol import make_csr
from engine.protos import engine_pb2
from tests.appliance.gateway_house import (
    API_KEY,
    AUTHORITY,
    CLIENT,
    House,
    Send,
    end,
    one_word_then_silence,
    open_house,
)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house() as opened:
        yield opened


def credentials(address: str = "127.0.0.1:1") -> Credentials:
    return Credentials(address, AUTHORITY.pem, CLIENT.certificate, CLIENT.key, API_KEY)


def test_it_needs_grpcio_and_protobuf_and_nothing_else() -> None:
    code = """
import sys
allowed = set(sys.stdlib_module_names) | {"grpc", "google", "appliance", "_cython", "typing_extensions"}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import appliance.client, appliance.client.admin, appliance.client.credentials
try:
    import cryptography
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "blocked: cryptography"


async def test_the_synchronous_client_streams_lists_and_collects(house: House) -> None:
    def use() -> None:
        with Client(
            house.gateway.address,
            ca=AUTHORITY.pem,
            certificate=CLIENT.certificate,
            key=CLIENT.key,
            api_key=API_KEY,
        ) as client:
            assert [model.name for model in client.list_models()] == ["notes"]
            stream = client.chat("notes", [{"role": "user", "content": "Hello"}], return_token_ids=True)
            assert list(stream) == ["Hel", "lo"]
            assert (stream.text, stream.token_ids, stream.usage.completion_tokens) == ("Hello", (0, 1), 3)
            assert stream.receipt.request_id == stream.accepted.request_id
            assert client.generate("notes", text="x").result().finished.reason == "stop"
            with pytest.raises(CloisterError) as error:
                list(client.generate("notes", text=""))
            assert (error.value.code, error.value.field) == ("EMPTY_PROMPT", "text")

    await asyncio.to_thread(use)


async def test_leaving_a_streams_with_block_cancels_it(house: House) -> None:
    house.worker.script = one_word_then_silence

    def use() -> None:
        with Client(
            house.gateway.address,
            ca=AUTHORITY.pem,
            certificate=CLIENT.certificate,
            key=CLIENT.key,
            api_key=API_KEY,
        ) as client:
            with client.generate("notes", "x") as stream:
                assert next(stream) == "Hel"
            with pytest.raises(CloisterError, match="CANCELLED"):
                next(stream)

    await asyncio.to_thread(use)
    assert (await house.settled()).reason == "CANCELLED"


async def test_a_task_that_is_cancelled_cancels_its_stream(house: House) -> None:
    house.worker.script = one_word_then_silence
    async with house.client() as client:
        stream = client.generate("notes", "x")
        assert await anext(stream) == "Hel"
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await house.settled()).reason == "CANCELLED"


async def test_what_has_not_come_yet_is_an_error_that_says_so(house: House) -> None:
    house.worker.script = one_word_then_silence
    async with house.client() as client, client.generate("notes", "x") as stream:
        assert await anext(stream) == "Hel"
        assert stream.accepted.prompt_tokens == 1
        for name in ("finished", "completed", "usage", "receipt"):
            with pytest.raises(RuntimeError, match="has not come yet"):
                getattr(stream, name)


async def test_the_directory_of_a_key_is_all_a_client_needs(house: House, tmp_path: Path) -> None:
    write_credentials(tmp_path / "c", credentials(house.gateway.address))
    async with AsyncClient.from_dir(tmp_path / "c") as client:
        assert (await client.generate("notes", "x").result()).text == "Hello"
    (tmp_path / "c" / "address").write_text("127.0.0.1:1\n")
    async with AsyncClient.from_dir(tmp_path / "c", address=house.gateway.address) as client:
        assert (await client.generate("notes", "x").result()).text == "Hello"


async def test_the_example_runs_as_it_is(house: House, tmp_path: Path) -> None:
    write_credentials(tmp_path / "c", credentials(house.gateway.address))
    done = await asyncio.create_subprocess_exec(
        sys.executable, str(tmp_path / "c" / "example.py"), stdout=asyncio.subprocess.PIPE
    )
    written, _ = await done.communicate()
    assert written.decode() == "Hello\n3 tokens; record 8 of the audit log\n"


def test_the_proto_in_the_directory_compiles_elsewhere(tmp_path: Path) -> None:
    write_credentials(tmp_path / "c", credentials())
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "--grpc_python_out=.",
            "inference.proto",
        ],
        cwd=tmp_path / "c", check=True,
    )  # fmt: skip
    code = "import inference_pb2_grpc; print(inference_pb2_grpc.InferenceServiceStub.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "c", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "InferenceServiceStub"


def test_secrets_are_the_owners_alone_and_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_credentials(folder, credentials())
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert (modes["client.key"], modes["api.key"]) == (0o600, 0o600)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before = (folder / "api.key").read_text()
    with pytest.raises(CloisterError) as error:
        write_credentials(folder, Credentials("h:1", b"", b"", b"", "other"))
    assert error.value.code == "CREDENTIALS_EXIST"
    assert (folder / "api.key").read_text() == before
    with pytest.raises(CloisterError):
        check_vacant(folder)
    check_vacant(tmp_path / "elsewhere")
    assert read_credentials(folder) == credentials()


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [("client.key", None, "CREDENTIALS_MISSING"), ("address", "\n", "ADDRESS_MISSING")],
)
def test_an_incomplete_directory_is_named(tmp_path: Path, name: str, content: str | None, code: str) -> None:
    folder = tmp_path / "c"
    write_credentials(folder, credentials())
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CloisterError) as error:
        Client.from_dir(folder)
    assert error.value.code == code
    assert name in error.value.message


def test_credentials_are_never_shown() -> None:
    shown = repr(credentials()) + str(credentials())
    assert API_KEY not in shown
    assert "PRIVATE" not in shown


def test_a_gateway_that_is_not_there_is_unavailable() -> None:
    client = Client(
        "127.0.0.1:1", ca=AUTHORITY.pem, certificate=CLIENT.certificate, key=CLIENT.key, api_key=API_KEY
    )
    with client, pytest.raises(CloisterError) as error:
        list(client.generate("notes", "x", retry=False))
    assert error.value.status is grpc.StatusCode.UNAVAILABLE


def test_an_option_that_does_not_exist_and_a_prompt_given_twice_are_programming_errors() -> None:
    with Client("127.0.0.1:1", ca=AUTHORITY.pem, certificate=CLIENT.certificate, key=CLIENT.key, api_key="k") as c:
        with pytest.raises(TypeError, match="temprature"):
            c.generate("notes", "x", temprature=1)  # type: ignore[call-arg]  # the mistake under test
        with pytest.raises(ValueError, match="either"):
            c.generate("notes", "x", token_ids=[1])
        with pytest.raises(ValueError, match="either"):
            c.generate("notes")
        with pytest.raises(ValueError, match="role and content"):
            c.chat("notes", [{"role": "user", "text": "x"}])


def test_a_request_to_certify_is_signed_with_the_key_that_stays(tmp_path: Path) -> None:
    key_pem, csr_pem = make_csr("ward", "notes")
    key = serialization.load_pem_private_key(key_pem, password=None)
    request = x509.load_pem_x509_csr(csr_pem)
    assert request.is_signature_valid
    assert request.public_key() == key.public_key()
    assert b"PRIVATE" not in csr_pem


async def test_a_refusal_that_says_not_again_is_not_sent_again(house: House) -> None:
    house.control.refuse["AwaitIntent"] = CloisterError("AUDIT_BLOCKED", "x", grpc.StatusCode.UNAVAILABLE)
    async with house.client() as client:
        with pytest.raises(CloisterError, match="AUDIT_BLOCKED"):
            await client.generate("notes", "x").result()
    assert len(house.control.asked("Authorize")) == 1, "its id is spent, so the gateway said no"


async def test_a_refusal_that_says_when_is_sent_again_then_and_no_more_than_four_times(house: House) -> None:
    house.control.refuse["Authorize"] = CloisterError(
        "MODEL_NOT_READY", "x", grpc.StatusCode.UNAVAILABLE, retry_after=timedelta(milliseconds=10)
    )
    async with house.client() as client:
        with pytest.raises(CloisterError, match="MODEL_NOT_READY"):
            await client.generate("notes", "x").result()
        assert len(house.control.asked("Authorize")) == 5
        with pytest.raises(CloisterError, match="MODEL_NOT_READY"):
            await client.generate("notes", "x", retry=False).result()
    assert len(house.control.asked("Authorize")) == 6


async def test_sending_again_ends_at_the_deadline(house: House) -> None:
    house.control.refuse["Authorize"] = CloisterError(
        "MODEL_NOT_READY", "x", grpc.StatusCode.UNAVAILABLE, retry_after=timedelta(seconds=30)
    )
    async with house.client() as client:
        with pytest.raises(CloisterError) as error:
            await client.generate("notes", "x", timeout=0.5).result()
    assert error.value.status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(house.control.asked("Authorize")) == 1


async def test_only_what_costs_nothing_is_sent_again_when_the_tenant_has_too_much_on_its_way(house: House) -> None:
    house.control.refuse_once["Authorize"] = CloisterError(
        "TENANT_CONCURRENCY", "x", grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=timedelta(milliseconds=10)
    )
    async with house.client() as client:
        assert await client.tokenize("notes", "hi") == (104, 105)
        assert len(house.control.asked("Authorize")) == 2
        house.control.refuse_once["Authorize"] = CloisterError("QUOTA", "x", grpc.StatusCode.RESOURCE_EXHAUSTED)
        with pytest.raises(CloisterError, match="QUOTA"):
            await client.tokenize("notes", "hi")
        assert len(house.control.asked("Authorize")) == 3, "a refusal that does not say when stays one"
        house.control.refuse_once["Authorize"] = CloisterError(
            "TENANT_CONCURRENCY", "x", grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=timedelta(milliseconds=10)
        )
        with pytest.raises(CloisterError, match="TENANT_CONCURRENCY"):
            await client.generate("notes", "x").result()
    assert len(house.control.asked("Authorize")) == 4


async def test_the_synchronous_client_gives_several_answers_and_tokens(house: House) -> None:
    async def script(submit: Any, send: Send) -> None:
        for index in (1, 0):
            one = engine_pb2.TokenLogprob(token_id=index, logprob=-1.0, rank=1)
            last = end(engine_pb2.END_REASON_LENGTH, completion_tokens=1)
            send(f"answer {index}", [index], last, index=index, logprobs=[one])

    house.worker.script = script

    def use() -> None:
        with Client(
            house.gateway.address,
            ca=AUTHORITY.pem,
            certificate=CLIENT.certificate,
            key=CLIENT.key,
            api_key=API_KEY,
        ) as client:
            stream = client.generate("notes", "x", n=2, logprobs=0)
            assert [(delta.index, delta.text) for delta in stream.deltas()] == [(1, "answer 1"), (0, "answer 0")]
            assert [answer.logprobs[0].token_id for answer in stream.answers] == [0, 1]
            with pytest.raises(ValueError, match="deltas"):
                next(client.generate("notes", "x", n=2))
            result = client.chat("notes", [{"role": "user", "content": "x"}], n=2).result()
            assert [choice.text for choice in result.choices] == ["answer 0", "answer 1"]
            assert client.detokenize("notes", client.tokenize("notes", "hi")) == "hi"

    await asyncio.to_thread(use)
