"""A gateway's side of a worker's Session stream, for tests."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

import grpc

from engine.protos import engine_pb2, engine_pb2_grpc

LIMIT_S = 30.0
OPTIONS = engine_pb2.DeploymentOptions(threads=1, deterministic=True, kv_blocks=128)


def submit(handle: int, prompt: Iterable[int] = (0, 40, 41, 42), max_tokens: int = 8) -> engine_pb2.Submit:
    return engine_pb2.Submit(
        handle=handle,
        scope="scope-a",
        salt=b"salt",
        weight=1,
        token_ids=prompt,
        top_p=1.0,
        seed=handle,
        max_tokens=max_tokens,
        ignore_eos=True,
    )


@dataclass
class Answer:
    """What a request has brought so far."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[engine_pb2.TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[engine_pb2.TokenLogprob] = field(default_factory=list)
    end: engine_pb2.End | None = None


class Session:
    """A gateway's side of one Session stream."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = engine_pb2_grpc.WorkerServiceStub(channel).Session()
        self.answers: dict[int, Answer] = {}  # the first answer to each request
        self.others: dict[tuple[int, int], Answer] = {}
        self.frames: list[engine_pb2.SessionResponse] = []

    async def send(self, command: engine_pb2.Submit | engine_pb2.Abort) -> None:
        if isinstance(command, engine_pb2.Submit):
            self.answers[command.handle] = Answer()
            self.others |= {(command.handle, i): Answer() for i in range(1, command.n)}
            await self.call.write(engine_pb2.SessionRequest(submit=command))
        else:
            await self.call.write(engine_pb2.SessionRequest(abort=command))

    async def read_frame(self) -> None:
        frame = await asyncio.wait_for(self.call.read(), LIMIT_S)
        assert isinstance(frame, engine_pb2.SessionResponse), "the stream ended"
        self.frames.append(frame)
        for row in frame.rows:
            answer = self.others[row.handle, row.index] if row.index else self.answers[row.handle]
            assert answer.end is None, "a row after the end"
            answer.token_ids.extend(row.token_ids)
            answer.text += row.text
            answer.logprobs.extend(row.logprobs)
            answer.prompt_logprobs.extend(row.prompt_logprobs)
            if row.HasField("end"):
                answer.end = row.end

    async def finish(self, handle: int) -> Answer:
        """Read until the request has ended."""
        while self.answers[handle].end is None:
            await self.read_frame()
        return self.answers[handle]

    async def finish_all(self, handle: int, count: int) -> list[Answer]:
        """Read until each of a request's answers has ended."""
        answers = self.all_of(handle, count)
        while any(answer.end is None for answer in answers):
            await self.read_frame()
        return answers

    def all_of(self, handle: int, count: int) -> list[Answer]:
        """The answers to a request, as far as they are."""
        return [self.answers[handle], *(self.others[handle, i] for i in range(1, count))]

    async def end_of(self, command: engine_pb2.Submit) -> engine_pb2.End:
        """Submit and read to the end."""
        await self.send(command)
        end = (await self.finish(command.handle)).end
        assert end is not None
        return end
