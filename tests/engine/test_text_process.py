"""engine-text as a process: it answers with codes, dies of a wedged template, and never holds torch."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from engine.protos import engine_pb2, engine_pb2_grpc
from engine.text import service
from tests.engine.processes import refusal, running
from tests.engine.tiny_models import TEMPLATE, byte_tokenizer, into_store, write_tokenizer

CONFIG = """{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64, "hidden_act": "silu"
}"""
WEDGED = """\
{% if messages[0].content == 'wedge' %}
{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{% endif %}{{ messages[0].content }}"""
HUNGRY = "{{ messages[0].content | center(2 ** 33) }}"


def deployment(folder: Path, store: Path, template: str, context: int = 64) -> bytes:
    folder.mkdir()
    write_tokenizer(folder, byte_tokenizer(), template)
    (folder / "config.json").write_text(
        CONFIG.replace('"max_position_embeddings": 64', f'"max_position_embeddings": {context}')
    )
    return engine_pb2.Deployment(name="notes", files=into_store(folder, store)).SerializeToString()


def turns(count: int) -> engine_pb2.PrepareRequest:
    messages = [engine_pb2.ChatMessage(role="user")] * count
    return engine_pb2.PrepareRequest(conversation=engine_pb2.Conversation(messages=messages))


def chat(content: str) -> engine_pb2.PrepareRequest:
    message = engine_pb2.ChatMessage(role="user", content=content)
    return engine_pb2.PrepareRequest(conversation=engine_pb2.Conversation(messages=[message]))


async def test_the_process_answers_with_tokens_or_codes_and_drains(tmp_path: Path, socket_dir: Path) -> None:
    stdin = deployment(tmp_path / "model", tmp_path / "store", HUNGRY)
    sock = socket_dir / "text.sock"
    argv = ("engine.text", "--store", str(tmp_path / "store"), "--socket", str(sock))
    async with running(socket_dir, argv, stdin) as text:
        assert text.said == ["READY=1", "X_CAPABILITIES=generate,chat"]
        assert "torch" not in Path(f"/proc/{text.process.pid}/maps").read_text()
        async with grpc.aio.insecure_channel(f"unix:{sock}") as channel:
            stub = engine_pb2_grpc.TextServiceStub(channel)
            answer = await stub.Prepare(engine_pb2.PrepareRequest(text="Claim 4711"))
            assert list(answer.token_ids) == byte_tokenizer().encode("Claim 4711").ids
            cases = [
                (engine_pb2.PrepareRequest(), "EMPTY_PROMPT"),
                (engine_pb2.PrepareRequest(token_ids=engine_pb2.TokenIds(ids=[1, 4000])), "TOKEN_OUT_OF_RANGE"),
                (engine_pb2.PrepareRequest(text="Q " * 5000), "CONTEXT_OVERFLOW"),
                (chat("x" * 64), "TEMPLATE_REFUSED"),
            ]
            for request, code in cases:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.Prepare(request)
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert (refused.value.details() or "").startswith(f"{code}: ")
            await check_both_ways(stub)
        assert await text.terminate() == 0


async def check_both_ways(stub: engine_pb2_grpc.TextServiceStub) -> None:
    text = "Claim <|end|> é"
    tokens = await stub.Tokenize(engine_pb2.TokenizeRequest(text=text, add_special_tokens=True))
    assert tokens.token_ids == (await stub.Prepare(engine_pb2.PrepareRequest(text=text))).token_ids
    back = await stub.Detokenize(engine_pb2.DetokenizeRequest(token_ids=[1, *tokens.token_ids]))
    assert back.text == text
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Detokenize(engine_pb2.DetokenizeRequest(token_ids=[4000]))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (refused.value.details() or "").startswith("TOKEN_OUT_OF_RANGE: ")


async def test_a_wedged_template_ends_the_process_by_the_kernel(tmp_path: Path, socket_dir: Path) -> None:
    stdin = deployment(tmp_path / "model", tmp_path / "store", WEDGED)
    sock = socket_dir / "text.sock"
    patient = tmp_path / "patient_text.py"  # the same process, but for a clock that ends nobody on a busy machine
    patient.write_text(
        "import sys\nfrom engine.text import __main__, service\n"
        "service.WALL_LIMIT_S = 3600.0\nsys.exit(__main__.main())\n"
    )
    argv = (patient.stem, "--store", str(tmp_path / "store"), "--socket", str(sock))
    async with (
        running(socket_dir, argv, stdin, tmp_path) as text,
        grpc.aio.insecure_channel(f"unix:{sock}") as channel,
    ):
        stub = engine_pb2_grpc.TextServiceStub(channel)
        await stub.Prepare(chat("fine"))
        with pytest.raises(grpc.aio.AioRpcError) as died:
            await stub.Prepare(chat("wedge"))
        assert died.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await text.process.wait() == -signal.SIGPROF


@pytest.mark.parametrize(
    ("call", "limit", "killed_by"),
    [
        ("lambda: time.sleep(3600)", "WALL_LIMIT_S", signal.SIGALRM),
        ("lambda: [0 for _ in iter(int, 1)]", "CPU_LIMIT_S", signal.SIGPROF),
    ],
)
def test_a_call_ends_with_the_process_once_the_clock_or_the_processor_time_has_run_out(
    call: str, limit: str, killed_by: signal.Signals
) -> None:
    program = f"""
import time
from engine.text import service
service.WALL_LIMIT_S = service.CPU_LIMIT_S = 3600.0
assert service._timed(lambda: 7) == 7
service.{limit} = 0.05
service._timed({call})"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -killed_by


def test_limits_end_with_the_call_that_they_are_for() -> None:
    with pytest.raises(ZeroDivisionError):
        service._timed(lambda: 1 // 0)
    assert signal.getitimer(signal.ITIMER_REAL) == signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


@pytest.mark.parametrize("context", [64, 131072])
async def test_a_conversation_of_empty_turns_is_refused_and_the_process_lives(
    tmp_path: Path, socket_dir: Path, context: int
) -> None:
    stdin = deployment(tmp_path / "model", tmp_path / "store", TEMPLATE, context)
    sock = socket_dir / "text.sock"
    argv = ("engine.text", "--store", str(tmp_path / "store"), "--socket", str(sock))
    async with running(socket_dir, argv, stdin) as text, grpc.aio.insecure_channel(f"unix:{sock}") as channel:
        stub = engine_pb2_grpc.TextServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Prepare(turns(130_000))
        assert (refused.value.details() or "").startswith("CONTEXT_OVERFLOW: 130000 messages")
        assert (await stub.Prepare(chat("fine"))).token_ids
        assert text.process.returncode is None


async def test_a_template_that_cannot_compile_is_refused_for_good(tmp_path: Path, socket_dir: Path) -> None:
    stdin = deployment(tmp_path / "model", tmp_path / "store", "{{ " + "(" * 50_000)
    argv = ("engine.text", "--store", str(tmp_path / "store"), "--socket", str(socket_dir / "text.sock"))
    status, line = await refusal(socket_dir, argv, stdin)
    assert (status, json.loads(line)["code"]) == (3, "TEMPLATE_INVALID")


async def test_a_changed_tokenizer_is_refused_with_its_code(tmp_path: Path, socket_dir: Path) -> None:
    stdin = deployment(tmp_path / "model", tmp_path / "store", HUNGRY)
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file() and b"added_tokens" in path.read_bytes():
            path.write_bytes(path.read_bytes().replace(b"<|end|>", b"<|End|>"))
    argv = ("engine.text", "--store", str(tmp_path / "store"), "--socket", str(socket_dir / "text.sock"))
    status, line = await refusal(socket_dir, argv, stdin)
    assert (status, json.loads(line)["code"]) == (3, "FILE_DIGEST_MISMATCH")
