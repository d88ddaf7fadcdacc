"""Generate and Chat: one prompt, answered as it is computed."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from appliance.gateway.events import answer_delta, completed, finish_name, finished, prompt_deltas
from appliance.gateway.neighbours import Neighbours
from appliance.gateway.parameters import check_min_tokens
from appliance.gateway.quarantine import fingerprint_of
from appliance.gateway.rows import EngineGoneError, Rows, slow_client
from appliance.gateway.validation import CheckedPrompt, check_length, room_for_answer
from appliance.gateway.walk import Walk, engine_error
from appliance.protos import control_pb2
from appliance.protos import inference_pb2 as api
from engine.protos import engine_pb2 as engine

Event = api.Accepted | api.Delta | api.Finished | api.Completed


class Generation(Walk):
    """One request for text.

    Args:
        neighbours: whom to ask.
        caller: who asks.
        method: full method name.
        request: what is asked.
        deadline: on the event loop's clock.
        send: writes one event to the client; waits while the client has no room.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        caller: control_pb2.Caller,
        method: str,
        request: CheckedPrompt,
        deadline: float,
        send: Callable[[Event], Awaitable[None]],
    ) -> None:
        super().__init__(neighbours, caller, method, request, deadline)
        self._request = request
        self._send_event = send

    async def submissions(self, place: control_pb2.AuthorizeResponse) -> list[engine.Submit]:
        """One: the prompt as tokens, and room for the answer.

        Raises:
            CloisterError: CONTEXT_OVERFLOW, INVALID_STOP, or as engine-text refuses.
        """
        request, parameters = self._request, self._request.parameters
        check_length(request.prompt, place.max_context_tokens)
        prepared = await self.neighbours.texts.prepare(place.text_socket, place.scope, request.prompt)
        prompt = list(prepared.token_ids)
        max_tokens = room_for_answer(parameters.max_tokens, len(prompt), place.max_context_tokens)
        check_min_tokens(parameters.stopping.min_tokens, max_tokens)
        return [parameters.submission(place.scope, prompt, max_tokens)]

    def fingerprint(self, place: control_pb2.AuthorizeResponse, submits: Sequence[engine.Submit]) -> bytes:
        """Of the prompt and the parameters; of the seed only when the client chose it."""
        return fingerprint_of(place.model_digest, submits, self._request.parameters.seed_given)

    def question(self, submits: Sequence[engine.Submit]) -> control_pb2.AdmitRequest:
        """Prompt and answers."""
        (submit,) = submits
        return control_pb2.AdmitRequest(
            prompt_tokens=len(submit.token_ids),
            max_tokens=submit.max_tokens,
            prompt_sha256=self._request.prompt_sha256,
            parameters=self._request.parameters.recorded(submit.max_tokens),
            answers=submit.n,
        )

    async def deliver(self, place: control_pb2.AuthorizeResponse, rows: Sequence[Rows]) -> str:
        """Write everything to the client, the last event included.

        `Accepted` waits for the worker's first row too: what comes after it is never a refusal.
        """
        (stream,) = rows
        row = await stream.next()
        if row.end.reason == engine.END_REASON_ERROR:
            raise engine_error(row.end)
        await self._send(
            api.Accepted(
                request_id=self.request_id,
                model_digest=place.model_digest,
                prompt_tokens=stream.prompt_tokens,
                seed=self._request.parameters.seed,
            )
        )
        self.begun = True
        left = self._request.parameters.n
        while True:
            await self._send_row(row)
            if row.HasField("end"):
                await self._send_end(row)
                left -= 1
                if not left:
                    break
            row = await stream.next()
        await self._send(completed(stream.ends, stream.prompt_tokens))
        return finish_name(stream.ends.values())

    async def _send_end(self, row: engine.Row) -> None:
        """One answer has ended: the client is told why, or the call ends with it."""
        if row.end.reason == engine.END_REASON_ERROR:
            raise engine_error(row.end)
        if row.end.reason not in (engine.END_REASON_STOP, engine.END_REASON_LENGTH):
            raise EngineGoneError
        await self._send(finished(row.index, row.end))

    async def _send_row(self, row: engine.Row) -> None:
        parameters = self._request.parameters
        if parameters.prompt_logprobs is not None:
            for delta in prompt_deltas(row):
                await self._send(delta)
        if row.text or row.token_ids:
            await self._send(answer_delta(row, parameters.return_token_ids))

    async def _send(self, event: Event) -> None:
        stall = asyncio.timeout(self.neighbours.limits.stall_seconds)
        try:
            async with stall:
                await self._send_event(event)
        except TimeoutError:
            raise slow_client() from None
