"""Embed and Rerank: many inputs, one request; the engine computes each for itself, the client gets all or none."""

import asyncio
import math
from abc import abstractmethod
from collections.abc import Sequence

import grpc

from appliance.errors import CloisterError
from appliance.gateway.batches import CheckedBatch, CheckedEmbed, CheckedRerank
from appliance.gateway.events import batch_timings, batch_usage
from appliance.gateway.neighbours import Neighbours
from appliance.gateway.quarantine import fingerprint_of
from appliance.gateway.rows import EngineGoneError, Rows
from appliance.gateway.texts import CALLS_OF_A_TENANT
from appliance.gateway.walk import Walk, engine_error
from appliance.protos import control_pb2
from appliance.protos import inference_pb2 as api
from engine.protos import engine_pb2 as engine

_DONE = (engine.END_REASON_STOP, engine.END_REASON_LENGTH)
_UNIT = 1e-6
"""A vector whose length is this close to 1 is of length 1 as far as its numbers can tell."""


class Gathering(Walk):
    """One request of many inputs.

    Args:
        neighbours: whom to ask.
        caller: who asks.
        method: full method name.
        request: what is asked.
        deadline: on the event loop's clock.

    Attributes:
        truncated: of each input, whether it was cut; known once all are prepared.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        caller: control_pb2.Caller,
        method: str,
        request: CheckedBatch,
        deadline: float,
    ) -> None:
        super().__init__(neighbours, caller, method, request, deadline)
        self.truncated: Sequence[bool] = ()
        self._request = request

    @abstractmethod
    def take(self, index: int, values: Sequence[float], prompt_tokens: int) -> None:
        """What the engine made of one input; never empty.

        Raises:
            CloisterError: it is not what was asked for.
        """

    @abstractmethod
    def complete(self, model_digest: str, usage: api.Usage, timings: api.BatchTimings) -> None:
        """Everything has been taken."""

    async def submissions(self, place: control_pb2.AuthorizeResponse) -> list[engine.Submit]:
        """One for each input.

        Raises:
            CloisterError: as engine-text refuses an input, with its field.
        """
        self._request.check_lengths(place.max_context_tokens)
        prepared = await self._prepare_all(place)
        self.truncated = [one.truncated for one in prepared]
        return [
            engine.Submit(
                scope=place.scope, token_ids=one.token_ids, type_ids=one.type_ids, task=self._request.task, n=1
            )
            for one in prepared
        ]

    def fingerprint(self, place: control_pb2.AuthorizeResponse, submits: Sequence[engine.Submit]) -> bytes:
        """Of all inputs, in their order."""
        return fingerprint_of(place.model_digest, submits, seed_given=False)

    def question(self, submits: Sequence[engine.Submit]) -> control_pb2.AdmitRequest:
        """The tokens of all inputs, and none to be generated."""
        return control_pb2.AdmitRequest(
            prompt_tokens=sum(len(submit.token_ids) for submit in submits),
            prompt_sha256=self._request.prompt_sha256,
            parameters=self._request.recorded(),
            inputs=len(submits),
        )

    async def deliver(self, place: control_pb2.AuthorizeResponse, rows: Sequence[Rows]) -> str:
        """Take every input's result; they wait in their rows, whatever the order in which they come."""
        try:
            for index, one in enumerate(rows):
                values = await self._values(index, one)
                self.begun = True
                self.take(index, values, one.prompt_tokens)
                await asyncio.sleep(0)  # a vector takes a moment; nobody waits for 256 of them
        except EngineGoneError:
            self.begun = any(one.ends for one in rows)
            raise
        ends = [one.ends[0] for one in rows]
        usage = batch_usage(ends, sum(one.prompt_tokens for one in rows))
        self.complete(place.model_digest, usage, batch_timings(ends))
        return ""

    async def _prepare_all(self, place: control_pb2.AuthorizeResponse) -> list[engine.PrepareResponse]:
        """Every input, so few at a time that what else the tenant asks comes between, and few messages exist."""
        prepared = [engine.PrepareResponse()] * self._request.count
        left = iter(range(self._request.count))

        async def work() -> None:
            for index in left:
                prepared[index] = await self._prepare(place, index)

        tasks = [asyncio.create_task(work()) for _ in range(CALLS_OF_A_TENANT)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return prepared

    async def _prepare(self, place: control_pb2.AuthorizeResponse, index: int) -> engine.PrepareResponse:
        prompt = self._request.prompt(index)
        try:
            return await self.neighbours.texts.prepare(place.text_socket, place.scope, prompt)
        except CloisterError as error:
            if error.status is grpc.StatusCode.INVALID_ARGUMENT:
                raise self._request.blamed(error, index) from None
            raise

    async def _values(self, index: int, rows: Rows) -> Sequence[float]:
        """What the engine made of one input."""
        row = await rows.next()
        while not row.HasField("end"):
            row = await rows.next()
        if row.end.reason == engine.END_REASON_ERROR:
            error = engine_error(row.end)
            raise error if error.status is grpc.StatusCode.UNAVAILABLE else self._request.blamed(error, index)
        if row.end.reason not in _DONE:
            raise EngineGoneError
        if not row.values:
            raise engine_error(
                engine.End(error_message="the engine answered nothing; tell the appliance's operator")
            )
        return row.values


class Embedding(Gathering):
    """One request for vectors.

    Args:
        neighbours: whom to ask.
        caller: who asks.
        method: full method name.
        request: what is asked.
        deadline: on the event loop's clock.

    Attributes:
        response: complete once the walk is.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        caller: control_pb2.Caller,
        method: str,
        request: CheckedEmbed,
        deadline: float,
    ) -> None:
        super().__init__(neighbours, caller, method, request, deadline)
        self.response = api.EmbedResponse(request_id=self.request_id)
        self._dimensions = request.dimensions
        self._normalize = request.normalize

    def take(self, index: int, values: Sequence[float], prompt_tokens: int) -> None:
        """The vector of one input.

        Raises:
            CloisterError: INVALID_DIMENSIONS.
        """
        if self._dimensions is not None and self._dimensions > len(values):
            raise CloisterError(
                "INVALID_DIMENSIONS",
                f"the model's vectors have {len(values)} numbers, and {self._dimensions} of them are wanted",
                metadata={"max_dimensions": str(len(values))},
                field="dimensions",
            )
        kept = values if self._dimensions is None else values[: self._dimensions]
        self.response.embeddings.add(
            index=index,
            values=unit(kept) if self._normalize else kept,
            prompt_tokens=prompt_tokens,
            truncated=self.truncated[index],
        )

    def complete(self, model_digest: str, usage: api.Usage, timings: api.BatchTimings) -> None:
        """Fill in what is said of all vectors."""
        self.response.MergeFrom(api.EmbedResponse(model_digest=model_digest, usage=usage, timings=timings))


class Ranking(Gathering):
    """One request for a ranking.

    Args:
        neighbours: whom to ask.
        caller: who asks.
        method: full method name.
        request: what is asked.
        deadline: on the event loop's clock.

    Attributes:
        response: complete once the walk is.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        caller: control_pb2.Caller,
        method: str,
        request: CheckedRerank,
        deadline: float,
    ) -> None:
        super().__init__(neighbours, caller, method, request, deadline)
        self.response = api.RerankResponse(request_id=self.request_id)
        self._top_n = request.top_n
        self._found: list[api.RankedDocument] = []

    def take(self, index: int, values: Sequence[float], prompt_tokens: int) -> None:
        """The score of one document: the model's one number."""
        document = api.RankedDocument(
            index=index, score=values[0], prompt_tokens=prompt_tokens, truncated=self.truncated[index]
        )
        self._found.append(document)

    def complete(self, model_digest: str, usage: api.Usage, timings: api.BatchTimings) -> None:
        """Rank; the sort keeps the order of documents of one score."""
        best = sorted(self._found, key=lambda document: -document.score)[: self._top_n]
        rest = api.RerankResponse(model_digest=model_digest, results=best, usage=usage, timings=timings)
        self.response.MergeFrom(rest)


def unit(values: Sequence[float]) -> Sequence[float]:
    """The vector of length 1 in the same direction; one of zeros has none and stays."""
    length = math.hypot(*values)
    if length == 0 or abs(length - 1) < _UNIT:
        return values
    return [value / length for value in values]
