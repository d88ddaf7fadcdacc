"""The synchronous client."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, Unpack

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
from appliance.errors import from_rpc_error
from appliance.protos import inference_pb2 as api
from appliance.protos import inference_pb2_grpc


class _Call(Protocol):
    """A server-streaming call, of either kind of answer."""

    def __iter__(self) -> Iterator[api.GenerateResponse | api.ChatResponse]: ...

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...

    def cancel(self) -> object: ...


class Stream(Transcript, Iterator[str]):
    """The answer to one request: an iterator of its text as it is generated, then its facts.

    With several answers (`n`), or to see token ids and log probabilities as they come, iterate over `deltas()`.

    Example:
        >>> stream = client.chat("notes", [{"role": "user", "content": "Hello"}])
        >>> for text in stream:
        ...     print(text, end="", flush=True)
        >>> stream.usage.completion_tokens, stream.receipt.audit_sequence
        >>> several = client.generate("notes", "Once upon a time", n=3, max_tokens=32)
        >>> for delta in several.deltas():
        ...     print(delta.index, delta.text)
    """

    def __init__(self, call: _Call, answers: int) -> None:
        super().__init__(answers)
        self._call = call

    def __next__(self) -> str:
        """The next piece of text; never empty.

        Raises:
            CloisterError: the request was refused, failed, or was cancelled.
            ValueError: there are several answers; use `deltas()`.
            StopIteration: the answer is complete, and so are the stream's facts.
        """
        self._check_single()
        while (delta := self._next_delta()) is not None:
            if delta.text:
                return delta.text
        raise StopIteration

    def deltas(self) -> Iterator[Delta]:
        """What each step brought, of any answer: its index, text, token ids and log probabilities.

        Raises:
            CloisterError: the request was refused, failed, or was cancelled.
        """
        while (delta := self._next_delta()) is not None:
            yield delta

    def _next_delta(self) -> Delta | None:
        """The next delta; None when the answer is complete."""
        try:
            for event in self._call:
                if (delta := self._take(event)) is not None:
                    return delta
            self._take_trailers(self._call.trailing_metadata() or ())
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return None

    def result(self) -> Completion:
        """All answers, once they are there."""
        for _ in self.deltas():
            pass
        return self._completion()

    def cancel(self) -> None:
        """Give up the answer; the appliance stops computing it within one step."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client:
    """A tenant's application at one appliance.

    Safe to share between threads. Use it in `with`, or call `close`.

    Args:
        address: host:port of the gateway.
        ca: PEM of the authority that signed the gateway's certificate.
        certificate: PEM of the application's certificate.
        key: PEM of its private key.
        api_key: the application's API key.

    Example:
        >>> from appliance.client import Client
        >>> with Client.from_dir("credentials") as client:
        ...     for text in client.chat("notes", [{"role": "user", "content": "Hello"}], temperature=0):
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
    ) -> Stream:
        """An answer to a conversation whose last message is the user's; see `Options`.

        Returns at once; refusals are raised by the stream.

        Example:
            >>> client.chat("notes", [{"role": "user", "content": "Hello"}], max_tokens=64).result().text
        """
        request = chat_request(model, messages, options)
        call = self._stub(options.get("retry", True)).Chat(
            request, timeout=options.get("timeout", DEFAULT_TIMEOUT_S), metadata=self._connection.metadata
        )
        return Stream(call, answers_of(options))

    def generate(
        self,
        model: str,
        text: str | None = None,
        *,
        token_ids: Iterable[int] | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """A continuation of a raw prompt, either text or token ids; no chat template is applied. See `Options`.

        Returns at once; refusals are raised by the stream.

        Example:
            >>> client.generate("notes", "Once upon a time", max_tokens=32, seed=7).result().text
        """
        request = generate_request(model, text, token_ids, options)
        call = self._stub(options.get("retry", True)).Generate(
            request, timeout=options.get("timeout", DEFAULT_TIMEOUT_S), metadata=self._connection.metadata
        )
        return Stream(call, answers_of(options))

    def embed(
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
            >>> client.embed("search", ["a cat on a mat", "quarterly results"]).vectors
            ((0.0213, -0.0481, ...), (-0.0752, 0.0117, ...))
        """
        request = embed_request(model, inputs, dimensions, normalize, truncate, options)
        timeout = options.get("timeout", DEFAULT_TIMEOUT_S)
        try:
            response, call = self._stub(options.get("retry", True)).Embed.with_call(
                request, timeout=timeout, metadata=self._connection.metadata
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return read_embeddings(response, call.trailing_metadata())

    def rerank(
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
            >>> ranking = client.rerank("judge", "Who is in bed 12?", ["Bed 4: Müller.", "Bed 12: Okafor."])
            >>> ranking.results[0].index
            1
        """
        request = rerank_request(model, query, documents, top_n, truncate, options)
        timeout = options.get("timeout", DEFAULT_TIMEOUT_S)
        try:
            response, call = self._stub(options.get("retry", True)).Rerank.with_call(
                request, timeout=timeout, metadata=self._connection.metadata
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return read_ranking(response, call.trailing_metadata())

    def tokenize(
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
            >>> client.tokenize("notes", "Hello")
            (1, 284, 119)
        """
        request = api.TokenizeRequest(model=model, text=text, add_special_tokens=add_special_tokens)
        stub = self._stub(retry)
        try:
            response = stub.Tokenize(request, timeout=timeout, metadata=self._connection.metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return tuple(response.token_ids)

    def detokenize(
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
            >>> client.detokenize("notes", [284, 119])
            'Hello'
        """
        request = api.DetokenizeRequest(model=model, token_ids=token_ids)
        stub = self._stub(retry)
        try:
            response = stub.Detokenize(request, timeout=timeout, metadata=self._connection.metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return response.text

    def list_models(self, timeout: float | None = DEFAULT_TIMEOUT_S) -> tuple[Model, ...]:
        """The models that this application may use, by name.

        Raises:
            CloisterError: the appliance refused, or is not there.
        """
        try:
            response = self._stub(True).ListModels(
                api.ListModelsRequest(), timeout=timeout, metadata=self._connection.metadata
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return read_models(response)

    def close(self) -> None:
        """Hang up; running streams are cancelled."""
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, where: Connection) -> None:
        self._connection = where
        self._channels = {
            retry: grpc.secure_channel(where.address, where.credentials, options=options)
            for retry, options in OPTIONS.items()
        }

    def _stub(self, retry: bool) -> inference_pb2_grpc.InferenceServiceStub:
        """Of the channel that sends again, or of the one that does not; a channel connects when first used."""
        return inference_pb2_grpc.InferenceServiceStub(self._channels[retry])
