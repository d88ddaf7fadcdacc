"""Tokenize and Detokenize: authorised like a request, held by one of the tenant's slots, charged nothing."""

import uuid

from appliance.gateway.neighbours import Neighbours
from appliance.gateway.validation import check_length, check_model
from appliance.protos import control_pb2
from appliance.protos import inference_pb2 as api
from engine.protos import engine_pb2 as engine


class Tokens:
    """Turns a tenant's texts into tokens of its models, and back. What cannot fit the model's context is refused.

    Args:
        neighbours: whom to ask.
    """

    def __init__(self, neighbours: Neighbours) -> None:
        self._neighbours = neighbours

    async def tokenize(
        self, caller: control_pb2.Caller, method: str, request: api.TokenizeRequest
    ) -> api.TokenizeResponse:
        """The tokens that Generate would make of a text.

        Raises:
            CloisterError: the refusal.
        """
        near, place = self._neighbours, await self._authorize(caller, method, request.model)
        with near.slots.slot(place.scope, place.max_concurrent):
            check_length(engine.PrepareRequest(text=request.text), place.max_context_tokens)
            question = engine.TokenizeRequest(text=request.text, add_special_tokens=request.add_special_tokens)
            ids = await near.texts.tokenize(place.text_socket, place.scope, question)
            return api.TokenizeResponse(token_ids=ids)

    async def detokenize(
        self, caller: control_pb2.Caller, method: str, request: api.DetokenizeRequest
    ) -> api.DetokenizeResponse:
        """The text of tokens.

        Raises:
            CloisterError: the refusal.
        """
        near, place = self._neighbours, await self._authorize(caller, method, request.model)
        with near.slots.slot(place.scope, place.max_concurrent):
            tokens = engine.TokenIds(ids=request.token_ids)
            check_length(engine.PrepareRequest(token_ids=tokens), place.max_context_tokens)
            question = engine.DetokenizeRequest(token_ids=request.token_ids)
            text = await near.texts.detokenize(place.text_socket, place.scope, question)
            return api.DetokenizeResponse(text=text)

    async def _authorize(
        self, caller: control_pb2.Caller, method: str, model: str
    ) -> control_pb2.AuthorizeResponse:
        """Where the model runs; no ticket comes with it, because nothing will be admitted."""
        check_model(model)
        return await self._neighbours.control.authorize(caller, method, model, str(uuid.uuid4()))
