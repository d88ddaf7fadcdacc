"""What the gateway refuses, each with its status, its code and a record; nothing gets further than it must."""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from appliance.client import AsyncClient, CloisterError
from appliance.protos import inference_pb2, inference_pb2_grpc
from tests.appliance.gateway_house import API_KEY, AUTHORITY, CLIENT, CONTEXT, House, open_house
from tests.appliance.pki import IDENTITY, Pair, TestAuthority

KEY_METADATA = (("authorization", f"Bearer {API_KEY}"),)
CANARY = "zebra-canary-4711"


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house() as opened:
        yield opened


async def refused(client: AsyncClient, **arguments: Any) -> CloisterError:
    """The error of one completion request."""
    async with client:
        with pytest.raises(CloisterError) as error:
            await client.generate("notes", **{"text": "x", "retry": False, **arguments}).result()
    return error.value


def recorded(house: House) -> list[tuple[str, str]]:
    """Identity and reason of the refusals on record."""
    return [(r.caller.identity, r.reason) for r in house.control.asked("RecordRefusal")]


@pytest.mark.parametrize(
    ("arguments", "code", "field"),
    [
        ({"text": ""}, "EMPTY_PROMPT", "text"),
        ({"text": None, "token_ids": []}, "EMPTY_PROMPT", "token_ids.ids"),
        ({"request_id": "not-a-uuid"}, "INVALID_REQUEST_ID", "request_id"),
        ({"request_id": "123e4567e89b12d3a456426614174000"}, "INVALID_REQUEST_ID", "request_id"),
        ({"temperature": float("nan")}, "INVALID_SAMPLING", "sampling.temperature"),
        ({"temperature": float("inf")}, "INVALID_SAMPLING", "sampling.temperature"),
        ({"temperature": -0.1}, "INVALID_SAMPLING", "sampling.temperature"),
        ({"temperature": 100.1}, "INVALID_SAMPLING", "sampling.temperature"),
        ({"top_p": 0.0}, "INVALID_SAMPLING", "sampling.top_p"),
        ({"top_p": 1.1}, "INVALID_SAMPLING", "sampling.top_p"),
        ({"top_p": float("nan")}, "INVALID_SAMPLING", "sampling.top_p"),
        ({"min_p": -0.1}, "INVALID_SAMPLING", "sampling.min_p"),
        ({"min_p": 1.1}, "INVALID_SAMPLING", "sampling.min_p"),
        ({"min_p": float("nan")}, "INVALID_SAMPLING", "sampling.min_p"),
        ({"frequency_penalty": 2.1}, "INVALID_SAMPLING", "sampling.frequency_penalty"),
        ({"presence_penalty": -2.1}, "INVALID_SAMPLING", "sampling.presence_penalty"),
        ({"presence_penalty": float("inf")}, "INVALID_SAMPLING", "sampling.presence_penalty"),
        ({"repetition_penalty": 0.0}, "INVALID_SAMPLING", "sampling.repetition_penalty"),
        ({"repetition_penalty": 10.5}, "INVALID_SAMPLING", "sampling.repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "INVALID_SAMPLING", "sampling.repetition_penalty"),
        ({"n": 0}, "INVALID_SAMPLING", "sampling.n"),
        ({"n": 9}, "INVALID_SAMPLING", "sampling.n"),
        ({"n": 10**9}, "INVALID_SAMPLING", "sampling.n"),
        ({"logit_bias": {1: 100.5}}, "INVALID_SAMPLING", "sampling.logit_bias"),
        ({"logit_bias": {1: 0.0, 2: float("nan")}}, "INVALID_SAMPLING", "sampling.logit_bias"),
        ({"logit_bias": {1: float("-inf")}}, "INVALID_SAMPLING", "sampling.logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "INVALID_SAMPLING", "sampling.logit_bias"),
        ({"min_tokens": 5, "max_tokens": 4}, "INVALID_STOP", "stopping.min_tokens"),
        ({"logprobs": 21}, "INVALID_OUTPUT", "output.logprobs"),
        ({"logprobs": 10**6}, "INVALID_OUTPUT", "output.logprobs"),
        ({"prompt_logprobs": 21}, "INVALID_OUTPUT", "output.prompt_logprobs"),
        ({"max_tokens": 0}, "INVALID_MAX_TOKENS", "stopping.max_tokens"),
        ({"stop": ["x"] * 17}, "INVALID_STOP", "stopping.stop"),
        ({"stop": ["x", ""]}, "INVALID_STOP", "stopping.stop[1]"),
        ({"stop": ["ä" * 65]}, "INVALID_STOP", "stopping.stop[0]"),
        ({"stop_token_ids": [1] * 17}, "INVALID_STOP", "stopping.stop_token_ids"),
        ({"text": "a" * (1 << 20)}, "REQUEST_TOO_LARGE", None),
        ({"text": "a" * 10_000_000}, "REQUEST_TOO_LARGE", None),
    ],
)
async def test_a_malformed_field_is_refused_by_name_and_recorded(
    house: House, arguments: dict[str, Any], code: str, field: str | None
) -> None:
    error = await refused(house.client(), **arguments)
    assert (error.status, error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, code, field)
    assert recorded(house) == [(IDENTITY, code)]
    assert house.control.asked("Authorize") == []
    assert house.text.requests == []


@pytest.mark.parametrize(
    ("messages", "code", "field"),
    [
        ([], "EMPTY_PROMPT", "messages"),
        ([("user", "")], "EMPTY_PROMPT", "messages"),
        ([("robot", "hi"), ("user", "x")], "INVALID_ROLE", "messages[0].role"),
        ([("user", "x"), ("assistant", "y")], "INVALID_ROLE", "messages[1].role"),
    ],
)
async def test_a_malformed_conversation_is_refused(
    house: House, messages: list[tuple[str, str]], code: str, field: str
) -> None:
    async with house.client() as client:
        with pytest.raises(CloisterError) as error:
            await client.chat("notes", [{"role": r, "content": c} for r, c in messages]).result()
    assert (error.value.code, error.value.field) == (code, field)


async def test_a_request_without_a_model_is_refused(house: House) -> None:
    async with house.client() as client:
        with pytest.raises(CloisterError) as error:
            await client.generate("", "x").result()
    assert (error.value.code, error.value.field) == ("MODEL_MISSING", "model")


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field"),
    [(CONTEXT, None, None), (CONTEXT + 9, 1, None), (CONTEXT - 3, 4, "stopping.max_tokens")],
)
async def test_what_does_not_fit_the_context_is_refused_with_the_numbers(
    house: House, prompt: int, max_tokens: int | None, field: str | None
) -> None:
    arguments = {} if max_tokens is None else {"max_tokens": max_tokens}
    error = await refused(house.client(), text="x" * prompt, **arguments)
    assert (error.status, error.code) == (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_OVERFLOW")
    assert dict(error.metadata) == {"prompt_tokens": str(prompt), "max_context_tokens": str(CONTEXT)}
    assert error.field == field
    assert house.control.asked("Admit") == []
    assert recorded(house) == [(IDENTITY, "CONTEXT_OVERFLOW")]


async def test_the_last_token_of_the_context_can_be_used(house: House) -> None:
    async with house.client() as client:
        await client.generate("notes", "x" * (CONTEXT - 1)).result()
        await client.generate("notes", "x" * (CONTEXT - 3), max_tokens=3).result()
    assert [submit.max_tokens for submit in house.worker.submits] == [1, 3]


async def test_a_message_beyond_the_transports_limit_is_refused_by_grpc(house: House) -> None:
    error = await refused(house.client(), text="a" * (17 << 20))
    assert error.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.retry_after is None


async def test_a_compressed_message_is_measured_unpacked(house: House) -> None:
    async with house.channel(compression=grpc.Compression.Gzip) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        bomb = inference_pb2.GenerateRequest(model="notes", text="a" * (40 << 20))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            _ = [event async for event in stub.Generate(bomb, metadata=KEY_METADATA)]
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", "Basic abc"),),
        (("authorization", "Bearer a b"),),
        (("authorization", "Bearer a"), ("authorization", "Bearer b")),
        (("authorization", f"Bearer {'k' * 600}"),),
    ],
)
async def test_a_call_without_exactly_one_key_is_refused(
    house: House, metadata: tuple[tuple[str, str], ...]
) -> None:
    async with house.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata)
    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert recorded(house) == [(IDENTITY, "API_KEY_MISSING")]
    assert house.control.asked("ListVisibleModels") == []


@pytest.mark.parametrize(
    "uris",
    [
        (),
        (IDENTITY, IDENTITY.replace("ward", "other")),
        ("https://test/tenant/ward/app/notes",),
        (IDENTITY, "https://elsewhere"),
    ],
)
async def test_a_certificate_without_exactly_one_identity_is_refused(house: House, uris: tuple[str, ...]) -> None:
    error = await refused(house.client(AUTHORITY.client(*uris)))
    assert (error.status, error.code) == (grpc.StatusCode.UNAUTHENTICATED, "AMBIGUOUS_IDENTITY")
    assert recorded(house) == [("", "AMBIGUOUS_IDENTITY")]


@pytest.mark.parametrize("kind", ["another authority", "expired", "a server's"])
async def test_a_certificate_that_does_not_verify_does_not_get_past_the_handshake(house: House, kind: str) -> None:
    pair: Pair = {
        "another authority": lambda: TestAuthority().client(IDENTITY),
        "expired": lambda: AUTHORITY.client(IDENTITY, expired=True),
        "a server's": AUTHORITY.server,
    }[kind]()
    error = await refused(house.client(pair), timeout=5)
    assert error.status is grpc.StatusCode.UNAVAILABLE
    assert house.control.asked("Authorize") == []
    assert recorded(house) == []


async def test_no_certificate_does_not_get_past_the_handshake(house: House) -> None:
    credentials = grpc.ssl_channel_credentials(AUTHORITY.pem)
    async with grpc.aio.secure_channel(house.gateway.address, credentials) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=KEY_METADATA, timeout=5)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_plain_text_does_not_get_an_answer(house: House) -> None:
    async with grpc.aio.insecure_channel(house.gateway.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=KEY_METADATA, timeout=5)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("version", "reasons"), [(ssl.TLSVersion.TLSv1_2, ["TLS_TOO_OLD"]), (ssl.TLSVersion.TLSv1_3, [])]
)
async def test_tls_older_than_1_3_is_refused(
    house: House, tmp_path: Any, version: ssl.TLSVersion, reasons: list[str]
) -> None:
    """Spoken by hand, because gRPC's own client cannot be made to use an old TLS."""
    await asyncio.to_thread(_list_models_by_hand, house.gateway.address, tmp_path, version)
    assert [reason for _, reason in recorded(house)] == reasons
    assert len(house.control.asked("ListVisibleModels")) == (0 if reasons else 1)


async def test_controls_refusal_is_passed_on_as_it_was_said(house: House) -> None:
    house.control.refuse["Authorize"] = CloisterError(
        "MODEL_NOT_FOUND", "no model of that name", grpc.StatusCode.NOT_FOUND, {"a": "b"}, field="model"
    )
    error = await refused(house.client())
    assert (error.code, error.message, error.status) == (
        "MODEL_NOT_FOUND", "no model of that name", grpc.StatusCode.NOT_FOUND,
    )  # fmt: skip
    assert (dict(error.metadata), error.field) == ({"a": "b"}, "model")
    assert recorded(house) == [], "control has recorded it"


async def test_controls_admission_refusal_carries_its_delay(house: House) -> None:
    house.control.refuse["Admit"] = CloisterError(
        "QUOTA", "too many", grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=timedelta(seconds=2.5)
    )
    error = await refused(house.client())
    assert (error.code, error.retry_after) == ("QUOTA", timedelta(seconds=2.5))
    assert house.control.asked("Settle") == []
    assert house.worker.submits == []


async def test_an_intent_that_cannot_be_recorded_ends_the_request_before_a_token(house: House) -> None:
    house.control.refuse["AwaitIntent"] = CloisterError("AUDIT_BLOCKED", "full", grpc.StatusCode.UNAVAILABLE)
    error = await refused(house.client())
    assert (error.status, error.code) == (grpc.StatusCode.UNAVAILABLE, "AUDIT_BLOCKED")
    settled = await house.settled()
    assert settled.reason == "AUDIT_BLOCKED"
    assert settled.outcome == 5


async def test_engine_texts_refusal_keeps_its_code(house: House) -> None:
    house.text.refuse = (grpc.StatusCode.INVALID_ARGUMENT, "TOKEN_OUT_OF_RANGE: id 9 is not in the vocabulary")
    error = await refused(house.client(), text=None, token_ids=[9])
    assert (error.status, error.code) == (grpc.StatusCode.INVALID_ARGUMENT, "TOKEN_OUT_OF_RANGE")
    assert error.message == "id 9 is not in the vocabulary"
    assert recorded(house) == [(IDENTITY, "TOKEN_OUT_OF_RANGE")]


async def test_googles_own_decoder_reads_the_refusal(house: House) -> None:
    async with house.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(model="notes", text="x")
        request.sampling.temperature = -1
        call = stub.Generate(request, metadata=KEY_METADATA)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            _ = [event async for event in call]
    status = await rpc_status.aio.from_call(call)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad)
    assert (info.reason, info.domain) == ("INVALID_SAMPLING", "cloister")
    assert bad.field_violations[0].field == "sampling.temperature"
    assert (status.code, status.message) == (error.value.code().value[0], error.value.details())


async def test_a_refusal_goes_out_even_when_it_cannot_be_recorded(house: House) -> None:
    house.control.refuse["RecordRefusal"] = CloisterError("BROKEN", "x", grpc.StatusCode.INTERNAL)
    assert (await refused(house.client(), temperature=-1.0)).code == "INVALID_SAMPLING"


async def test_a_refusal_names_no_word_of_the_request(house: House) -> None:
    texts = [
        str(await refused(house.client(), text=CANARY, temperature=-1.0)),
        str(await refused(house.client(), request_id=CANARY)),
        str(await refused(house.client(), stop=[CANARY * 20])),
        str(await refused(house.client(), text=CANARY * 10)),
    ]
    assert len(set(texts)) == 4
    assert CANARY not in "".join(texts)


def _list_models_by_hand(address: str, folder: Any, version: ssl.TLSVersion) -> None:
    """ListModels in raw HTTP/2 frames (RFC 9113) with literal headers (RFC 7541), to its end or the server's."""
    (folder / "c.pem").write_bytes(CLIENT.certificate + CLIENT.key)
    context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
    context.load_cert_chain(folder / "c.pem")
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    headers = {
        ":method": "POST", ":scheme": "https", ":authority": "localhost", "te": "trailers",
        ":path": "/cloister.inference.v1.InferenceService/ListModels", "content-type": "application/grpc",
        "authorization": f"Bearer {API_KEY}",
    }  # fmt: skip
    ordered = sorted(headers.items(), key=lambda item: not item[0].startswith(":"))
    block = b"".join(b"\x00" + _literal(name) + _literal(value) for name, value in ordered)
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as sock,
    ):
        assert sock.version() == {ssl.TLSVersion.TLSv1_2: "TLSv1.2", ssl.TLSVersion.TLSv1_3: "TLSv1.3"}[version]
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b""))
        sock.sendall(_frame(1, 4, 1, block) + _frame(0, 1, 1, b"\x00" * 5))
        while True:
            length, kind, flags = struct.unpack(">IBB", b"\x00" + _exactly(sock, 5))
            _exactly(sock, 4 + length)
            if kind == 1 and flags & 1:
                return


def _literal(text: str) -> bytes:
    """A string literal of at most 126 bytes, not Huffman coded."""
    assert len(text) < 127
    return bytes([len(text)]) + text.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _exactly(sock: ssl.SSLSocket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        chunk = sock.recv(count - len(received))
        assert chunk, "the server hung up"
        received += chunk
    return received
