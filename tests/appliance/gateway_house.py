"""A gateway, and the test in the place of control, engine-text and engine-worker on their sockets."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from appliance.client import AsyncClient
from appliance.errors import CloisterError, abort
from appliance.gateway.limits import Limits
from appliance.gateway.server import Gateway
from appliance.protos import control_pb2, control_pb2_grpc
from engine.process import Process
from engine.protos import engine_pb2, engine_pb2_grpc
from tests.appliance.pki import IDENTITY, Pair, TestAuthority

API_KEY = "clo_0123456789ab_secret_00000000"
CONTEXT = 64
Context = Any
Send = Callable[..., None]
AUTHORITY = TestAuthority()
CLIENT = AUTHORITY.client(IDENTITY)


class FakeControl(control_pb2_grpc.ControlServiceServicer):
    """Grants everything, notes every call, and refuses or waits where a test says so."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.calls: list[tuple[str, Any]] = []
        self.refuse: dict[str, CloisterError] = {}
        self.refuse_once: dict[str, CloisterError] = {}
        self.hold: dict[str, asyncio.Event] = {}
        self.max_concurrent = 100
        self.scope = "s1"
        self.digest = "d" * 64
        self.closed_leases: list[str] = []
        self.arrived: dict[str, asyncio.Event] = {
            name: asyncio.Event() for name in ("Admit", "AwaitIntent", "Settle", "Heartbeat", "RecordRefusal")
        }

    def asked(self, name: str) -> list[Any]:
        """The requests of one method so far."""
        return [request for method, request in self.calls if method == name]

    async def _meet(self, name: str, request: Any, context: Context) -> None:
        self.calls.append((name, request))
        if name in self.arrived:
            self.arrived[name].set()
        if name in self.hold:
            await self.hold[name].wait()
        if name in self.refuse_once:
            await abort(context, self.refuse_once.pop(name))
        if name in self.refuse:
            await abort(context, self.refuse[name])

    async def Authorize(self, request: Any, context: Context) -> Any:
        await self._meet("Authorize", request, context)
        return control_pb2.AuthorizeResponse(
            ticket="ticket",
            deployment="notes",
            text_socket=str(self.run / "text-notes.sock"),
            worker_socket=str(self.run / "worker-notes.sock"),
            model_digest=self.digest,
            max_context_tokens=CONTEXT,
            scope=self.scope,
            max_concurrent=self.max_concurrent,
        )

    async def Admit(self, request: Any, context: Context) -> Any:
        await self._meet("Admit", request, context)
        return control_pb2.AdmitResponse(lease=f"lease-{request.ticket}", scope=self.scope, salt=b"salt", weight=3)

    async def AwaitIntent(self, request: Any, context: Context) -> Any:
        await self._meet("AwaitIntent", request, context)
        return control_pb2.AwaitIntentResponse(audit_sequence=7)

    async def Settle(self, request: Any, context: Context) -> Any:
        await self._meet("Settle", request, context)
        return control_pb2.SettleResponse(audit_sequence=8, leaf_hash=b"L" * 32)

    async def ListVisibleModels(self, request: Any, context: Context) -> Any:
        await self._meet("ListVisibleModels", request, context)
        model = control_pb2.ListVisibleModelsResponse.Model(
            name="notes", model_digest="d" * 64, max_context_tokens=CONTEXT, capabilities=["chat"], ready=True
        )
        return control_pb2.ListVisibleModelsResponse(models=[model])

    async def Heartbeat(self, request: Any, context: Context) -> Any:
        await self._meet("Heartbeat", request, context)
        return control_pb2.HeartbeatResponse(closed_leases=self.closed_leases)

    async def RecordRefusal(self, request: Any, context: Context) -> Any:
        await self._meet("RecordRefusal", request, context)
        return control_pb2.RecordRefusalResponse()


class FakeText(engine_pb2_grpc.TextServiceServicer):
    """One token for each character, or for each message of a conversation."""

    def __init__(self) -> None:
        self.refuse: tuple[grpc.StatusCode, str] | None = None
        self.requests: list[Any] = []
        self.free = asyncio.Event()
        self.free.set()

    async def _meet(self, request: Any, context: Context) -> None:
        self.requests.append(request)
        await self.free.wait()
        if self.refuse:
            await context.abort(*self.refuse)

    async def Prepare(self, request: Any, context: Context) -> Any:
        await self._meet(request, context)
        if request.HasField("token_ids"):
            return engine_pb2.PrepareResponse(token_ids=request.token_ids.ids)
        if request.HasField("pair"):
            query, document = map(len, (request.pair.query, request.pair.document))
            return self._cut(request, query + document, [0] * query + [1] * document)
        return self._cut(request, len(request.text) or len(request.conversation.messages), [])

    def _cut(self, request: Any, length: int, type_ids: list[int]) -> Any:
        """As many tokens, at most those of the context where the request is to be cut."""
        most = CONTEXT if request.truncate else length
        return engine_pb2.PrepareResponse(
            token_ids=range(min(length, most)), type_ids=type_ids[:most], truncated=length > most
        )

    async def Tokenize(self, request: Any, context: Context) -> Any:
        await self._meet(request, context)
        return engine_pb2.TokenizeResponse(token_ids=map(ord, request.text))

    async def Detokenize(self, request: Any, context: Context) -> Any:
        await self._meet(request, context)
        return engine_pb2.DetokenizeResponse(text="".join(map(chr, request.token_ids)))


class FakeWorker(engine_pb2_grpc.WorkerServiceServicer):
    """Runs `script` for each request; the script sends rows, one frame each."""

    def __init__(self) -> None:
        self.submits: list[Any] = []
        self.aborts: list[int] = []
        self.aborted = asyncio.Event()
        self.sessions = 0
        self.deaf = False
        self._frames: list[asyncio.Queue[Any]] = []
        self.script: Callable[[Any, Send], Awaitable[None]] = say("Hel", "lo")
        self._step = 0

    async def Session(self, requests: Any, context: Context) -> AsyncIterator[Any]:
        self.sessions += 1
        frames: asyncio.Queue[Any] = asyncio.Queue()
        self._frames.append(frames)
        tasks = [asyncio.create_task(self._commands(requests, frames))]
        try:
            while (frame := await frames.get()) is not None:
                yield frame
        finally:
            for task in tasks:
                task.cancel()

    def drained(self) -> None:
        """End every session in order, as a worker does that is being stopped."""
        while self._frames:
            self._frames.pop().put_nowait(None)

    async def _commands(self, requests: Any, frames: "asyncio.Queue[Any]") -> None:
        running: dict[int, asyncio.Task[None]] = {}
        answers: dict[int, set[int]] = {}
        async for command in requests:
            if command.HasField("abort"):
                handle = command.abort.handle
                self.aborts.append(handle)
                if self.deaf:
                    continue
                if handle in running:
                    running.pop(handle).cancel()
                    last = end(engine_pb2.END_REASON_ABORTED, completion_tokens=2)
                    for index in answers[handle]:
                        self._frame(frames, handle, "", (), last, index=index)
                self.aborted.set()
                continue
            submit = command.submit
            self.submits.append(submit)
            answers[submit.handle] = set(range(submit.n))

            def send(
                text: str = "", ids: Any = (), end: Any = None, handle: int = submit.handle, **more: Any
            ) -> None:
                if end:
                    answers[handle].discard(more.get("index", 0))
                self._frame(frames, handle, text, ids, end, **more)

            running[submit.handle] = asyncio.create_task(self.script(submit, send))

    def _frame(
        self, frames: "asyncio.Queue[Any]", handle: int, text: str, ids: Any, end: Any, **more: Any
    ) -> None:
        self._step += 1
        row = engine_pb2.Row(handle=handle, text=text, token_ids=ids, end=end, **more)
        frames.put_nowait(engine_pb2.SessionResponse(step=self._step, rows=[row]))


def end(reason: int = engine_pb2.END_REASON_STOP, **fields: Any) -> Any:
    """The end of a request."""
    return engine_pb2.End(reason=reason, **fields)


def say(*pieces: str) -> Callable[[Any, Send], Awaitable[None]]:
    """A script: each piece in its own step, one token each, then a stop."""

    async def script(submit: Any, send: Send) -> None:
        for index, piece in enumerate(pieces):
            send(piece, [index])
        send(
            end=end(
                stop_token_id=2,
                prompt_tokens=len(submit.token_ids),
                completion_tokens=len(pieces) + 1,
                queue_ns=1_000_000,
                prefill_ns=2_000_000,
                decode_ns=3_000_000_000,
            )
        )

    return script


async def silence(submit: Any, send: Send) -> None:
    """A script: says nothing, for ever."""
    await asyncio.Event().wait()


async def one_word_then_silence(submit: Any, send: Send) -> None:
    """A script: one token, then nothing."""
    send("Hel", [1])
    await asyncio.Event().wait()


async def computed(submit: Any, send: Send) -> None:
    """A script: of a vector, three numbers that tell the tokens; of a pair, a score that does."""
    tokens = len(submit.token_ids)
    values = [float(tokens), 0.0, 4.0] if submit.task == engine_pb2.TASK_EMBED else [float(tokens % 7)]
    last = end(
        prompt_tokens=tokens,
        cached_prompt_tokens=1,
        recomputed_tokens=2,
        queue_ns=2_000_000_000,
        prefill_ns=1_000_000_000 * submit.handle,
    )
    send(end=last, values=values)


class House:
    """The gateway and its neighbours."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.control = FakeControl(home / "run")
        self.text = FakeText()
        self.worker = FakeWorker()
        self.process = Process("gateway")
        self.servers: dict[str, grpc.aio.Server] = {}
        self.gateway: Gateway

    async def start_control(self) -> None:
        await self._serve(
            "control", lambda s: control_pb2_grpc.add_ControlServiceServicer_to_server(self.control, s)
        )

    async def start_worker(self) -> None:
        await self._serve(
            "worker-notes", lambda s: engine_pb2_grpc.add_WorkerServiceServicer_to_server(self.worker, s)
        )

    async def start_text(self) -> None:
        await self._serve("text-notes", lambda s: engine_pb2_grpc.add_TextServiceServicer_to_server(self.text, s))

    async def kill(self, name: str) -> None:
        """The process is gone, its calls with it."""
        await self.servers.pop(name).stop(None)

    def client(self, pair: Pair = CLIENT, api_key: str = API_KEY) -> AsyncClient:
        return AsyncClient(
            self.gateway.address, ca=AUTHORITY.pem, certificate=pair.certificate, key=pair.key, api_key=api_key
        )

    def channel(self, pair: Pair = CLIENT, **options: Any) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(AUTHORITY.pem, pair.key, pair.certificate)
        return grpc.aio.secure_channel(self.gateway.address, credentials, **options)

    async def settled(self) -> Any:
        """The one settlement, once control has it."""
        await self.control.arrived["Settle"].wait()
        (request,) = self.control.asked("Settle")
        return request

    async def _serve(self, name: str, add: Callable[[grpc.aio.Server], None]) -> None:
        server = grpc.aio.server(options=(("grpc.max_receive_message_length", 16 << 20),))
        add(server)
        self.process.listen(server, self.home / "run" / f"{name}.sock")
        await server.start()
        self.servers[name] = server


def make_home() -> Path:
    """A home directory with what `init` makes for a gateway."""
    home = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    (home / "run").mkdir(mode=0o700)
    (home / "gateway").mkdir(mode=0o700)
    pair = AUTHORITY.server()
    (home / "gateway" / "tls.pem").write_bytes(pair.certificate)
    (home / "gateway" / "tls.key").write_bytes(pair.key)
    (home / "gateway" / "client-ca.pem").write_bytes(AUTHORITY.pem)
    return home


@asynccontextmanager
async def open_house(limits: Limits | None = None) -> AsyncIterator[House]:
    """A gateway that serves, with its neighbours."""
    home = make_home()
    house = House(home)
    try:
        await house.start_control()
        await house.start_text()
        await house.start_worker()
        house.gateway = Gateway(home, "127.0.0.1:0", limits=limits)
        serving = asyncio.create_task(house.gateway.serve(house.process))
        await house.control.arrived["Heartbeat"].wait()
        yield house
        house.process.stop()
        await serving
    finally:
        for server in house.servers.values():
            await server.stop(None)
        shutil.rmtree(home, ignore_errors=True)
