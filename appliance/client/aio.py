"""The asynchronous client."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import grpc

from appliance.client.batches import (
    CallOptions,
    Embeddings,
    Ranking,
    embed_request,
    read_embeddings,
    read_ranking,
    rerank_request,
)
from appliance.client.connection import OPTIONS, Connection, connection, connection_from
from appliance.client.requests import DEFAULT_TIMEOUT_S, Options, answers_of, chat_request, generate_request
from appliance.client.results import Completion, Delta, Message, Model, read_models
from appliance.client.transcript import Transcript
from appliance.errors import CloisterError, from_rpc_error
from appliance.protos import inference_pb2 as api
from appliance.protos import inference_pb2_grpc

_Call = (
    grpc.aio.UnaryStreamCall[api.GenerateRequest, api.GenerateResponse]
    | grpc.aio.UnaryStreamCall[api.ChatRequest, api.ChatResponse]
)


class AsyncStream(Transcript, AsyncIterator[str]):
    """The answer to one request: an asynchronous iterator of its text as it is generated, then its facts.

    With several answers (`n`), or to see token ids and log probabilities as they come, iterate over `deltas()`.

    Example:
        >>> stream = client.chat("notes", [{"role": "user", "content": "Hello"}])
        >>> async for text in stream:
        ...     print(text, end="", flush=True)
        >>> stream.usage.completion_tokens, stream.receipt.audit_sequence
        >>> several = client.generate("notes", "Once upon a time", n=3, max_tokens=32)
        >>> async for delta in several.deltas():
        ...     print(delta.index, delta.text)
    """

    def __init__(self, call: _Call, answers: int) -> None:
        super().__init__(answers)
        self._call = call
        self._cancelled = False

    async def __anext__(self) -> str:
        """The next piece of text; never empty.

        Raises:
            CloisterError: the request was refused, failed, or was cancelled with `cancel`.
            ValueError: there are several answers; use `deltas()`.
            StopAsyncIteration: the answer is complete, and so are the stream's facts.
        """
        self._check_single()
        while (delta := await self._next_delta()) is not None:
            if delta.text:
                return delta.text
        raise StopAsyncIteration

    async def deltas(self) -> AsyncIterator[Delta]:
        """What each step brought, of any answer: its index, text, token ids and log probabilities.

        Raises:
            CloisterError: the request was refused, failed, or was cancelled with `cancel`.
        """
        while (delta := await self._next_delta()) is not None:
            yield delta

    async def _next_delta(self) -> Delta | None:
        """The next delta; None when the answer is complete."""
        try:
            async for event in self._call:
                if (delta := self._take(event)) is not None:
                    return delta
            self._take_trailers(await self._call.trailing_metadata() or ())
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        except asyncio.CancelledError:
            if not self._cancelled:
                self._call.cancel()
                raise
            raise CloisterError("CANCELLED", "the stream was cancelled", grpc.StatusCode.CANCELLED) from None
        return None

    async def result(self) -> Completion:
        """All answers, once they are there."""
        async for _ in self.deltas():
            pass
        return self._completion()

    def cancel(self) -> None:
        """Give up the answer; the appliance stops computing it within one step."""
        self._cancelled = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncClient:
    """A tenant's application at one appliance, for one event loop.

    Use it in `async with`, or await `close`.

    Args:
        address: host:port of the gateway.
        ca: PEM of the authority that signed the gateway's certificate.
        certificate: PEM of the application's certificate.
        key: PEM of its private key.
        api_key: the application's API key.

    Example:
        >>> from appliance.client import AsyncClient
        >>> async with AsyncClient.from_dir("credentials") as client:
        ...     async for text in client.chat("notes", [{"role": "user", "content": "Hello"}]):
        ...         print(text, end="", flush=True)
    """

    def __init__(self, address: str, *, ca: bytes, certificate: bytes, key: bytes, api_key: str) -> None:
        self._open(connection(address, ca, certificate, key, api_key))

    @classmethod
    def from_dir(cls, path: Path | str, address: str | None = None) -> Self:
        """A client made from the directory that `cloister key issue --out DIR` wrote.

        Args:
            path: the directory.
            address: host:port, when it is not the one in the directory.

        Raises:
            CloisterError: CREDENTIALS_MISSING, or ADDRESS_MISSING.
        """
        client = cls.__new__(cls)
        client._open(connection_from(path, address))
        return client

    def chat(
        self, model: str, messages: Iterable[Message | Mapping[str, str]], **options: Unpack[Options]
    ) -> AsyncStream:
        """An answer to a conversation whose last message is the user's; see `Options`.

        Returns at once; refusals are raised by the stream.

        Example:
            >>> (await client.chat("notes", [{"role": "user", "content": "Hello"}]).result()).text
        """
        request = chat_request(model, messages, options)
        call = self._stub(options.get("retry", True)).Chat(
            request, timeout=options.get("timeout", DEFAULT_TIMEOUT_S), metadata=self._connection.metadata
        )
        return AsyncStream(call, answers_of(options))

    def generate(
        self,
        model: str,
        text: str | None = None,
        *,
        token_ids: Iterable[int] | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream:
        """A continuation of a raw prompt, either text or token ids; no chat template is applied. See `Options`.

        Returns at once; refusals are raised by the stream.

        Example:
            >>> (await client.generate("notes", "Once upon a time", max_tokens=32, seed=7).result()).text
        """
        request = generate_request(model, text, token_ids, options)
        call = self._stub(options.get("retry", True)).Generate(
            request, timeout=options.get("timeout", DEFAULT_TIMEOUT_S), metadata=self._connection.metadata
        )
        return AsyncStream(call, answers_of(options))

    async def embed(
        self,
        model: str,
        inputs: str | Iterable[str | Sequence[int]],
        *,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: bool = False,
        **options: Unpack[CallOptions],
    ) -> Embeddings:
        """A vector of each input, to search and to compare by; of a model with the capability `embed`.

        All inputs are one request: charged, recorded and answered together, or refused together. See
        `CallOptions`.

        Args:
            model: an alias, from `list_models`.
            inputs: 1 to 256 texts or lists of token ids; a text alone is one input. What the model's maker wants
                before a text, such as "query: ", is yours to put there.
            dimensions: keep this many numbers of each vector, the first, of models that are trained for it.
            normalize: scale each vector to length 1, so that the dot product of two is their cosine.
            truncate: cut what is longer than the model takes, and say so, instead of refusing it.

        Raises:
            CloisterError: the appliance refused or failed; `field` names the input where it is one.

        Example:
            >>> (await client.embed("search", ["a cat on a mat", "quarterly results"])).vectors
            ((0.0213, -0.0481, ...), (-0.0752, 0.0117, ...))
        """
        request = embed_request(model, inputs, dimensions, normalize, truncate, options)
        timeout = options.get("timeout", DEFAULT_TIMEOUT_S)
        call = self._stub(options.get("retry", True)).Embed(
            request, timeout=timeout, metadata=self._connection.metadata
        )
        try:
            return read_embeddings(await call, await call.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def rerank(
        self,
        model: str,
        query: str,
        documents: Iterable[str],
        *,
        top_n: int | None = None,
        truncate: bool = False,
        **options: Unpack[CallOptions],
    ) -> Ranking:
        """Documents by how well they answer a query, best first; of a model with the capability `rerank`.

        All documents are one request: charged, recorded and answered together, or refused together. See
        `CallOptions`.

        Args:
            model: an alias, from `list_models`.
            query: what is asked.
            documents: 1 to 256 texts.
            top_n: answer with this many of the best; all are computed and charged.
            truncate: cut what is longer than the model takes, and say so, instead of refusing it.

        Raises:
            CloisterError: the appliance refused or failed; `field` names the document where it is one.

        Example:
            >>> ranking = await client.rerank("judge", "Who is in bed 12?", ["Bed 4: Müller.", "Bed 12: Okafor."])
            >>> ranking.results[0].index
            1
        """
        request = rerank_request(model, query, documents, top_n, truncate, options)
        timeout = options.get("timeout", DEFAULT_TIMEOUT_S)
        call = self._stub(options.get("retry", True)).Rerank(
            request, timeout=timeout, metadata=self._connection.metadata
        )
        try:
            return read_ranking(await call, await call.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def tokenize(
        self,
        model: str,
        text: str,
        *,
        add_special_tokens: bool = True,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        retry: bool = True,
    ) -> tuple[int, ...]:
        """The tokens that `generate` would make of a text; control tokens in it are ordinary text. Costs nothing.

        Args:
            model: an alias, from `list_models`.
            text: at most what the model's context can hold.
            add_special_tokens: add the model's usual special tokens, as `generate` does.
            timeout: seconds.
            retry: send again while the appliance is not available, or says when.

        Raises:
            CloisterError: the appliance refused, or is not there.

        Example:
            >>> await client.tokenize("notes", "Hello")
            (1, 284, 119)
        """
        request = api.TokenizeRequest(model=model, text=text, add_special_tokens=add_special_tokens)
        stub = self._stub(retry)
        try:
            response = await stub.Tokenize(request, timeout=timeout, metadata=self._connection.metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return tuple(response.token_ids)

    async def detokenize(
        self,
        model: str,
        token_ids: Iterable[int],
        *,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        retry: bool = True,
    ) -> str:
        """The text of tokens; control tokens are left out, broken UTF-8 is replaced by U+FFFD. Costs nothing.

        Args:
            model: an alias, from `list_models`.
            token_ids: of its vocabulary, at most as many as its context holds.
            timeout: seconds.
            retry: send again while the appliance is not available, or says when.

        Raises:
            CloisterError: the appliance refused, or is not there.

        Example:
            >>> await client.detokenize("notes", [284, 119])
            'Hello'
        """
        request = api.DetokenizeRequest(model=model, token_ids=token_ids)
        stub = self._stub(retry)
        try:
            response = await stub.Detokenize(request, timeout=timeout, metadata=self._connection.metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return response.text

    async def list_models(self, timeout: float | None = DEFAULT_TIMEOUT_S) -> tuple[Model, ...]:
        """The models that this application may use, by name.

        Raises:
            CloisterError: the appliance refused, or is not there.
        """
        try:
            response = await self._stub(True).ListModels(
                api.ListModelsRequest(), timeout=timeout, metadata=self._connection.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return read_models(response)

    async def close(self) -> None:
        """Hang up; running streams are cancelled."""
        for channel in self._channels.values():
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _open(self, where: Connection) -> None:
        self._connection = where
        self._channels = {
            retry: grpc.aio.secure_channel(where.address, where.credentials, options=options)
            for retry, options in OPTIONS.items()
        }

    def _stub(self, retry: bool) -> "inference_pb2_grpc.InferenceServiceAsyncStub":
        """Of the channel that sends again, or of the one that does not; a channel connects when first used."""
        return inference_pb2_grpc.InferenceServiceStub(self._channels[retry])
