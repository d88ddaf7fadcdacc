"""Vectors and rankings: the messages of requests with many inputs, and what comes of them as frozen values."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypedDict

from appliance.client.results import Receipt, Usage, read_receipt
from appliance.client.transcript import RECEIPT_TRAILER
from appliance.protos import inference_pb2 as api


class CallOptions(TypedDict, total=False):
    """How a call is made.

    Keys:
        request_id: a UUID; a request sent again under the same id is refused, never computed or charged twice.
        timeout: seconds; default 120.
        retry: send again while the appliance is not available (loading, restarting), four times at the most and
            never past the timeout; default True. A request that was admitted is never sent again.
    """

    request_id: str
    timeout: float | None
    retry: bool


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vector of one input.

    Attributes:
        index: which of the inputs.
        values: as long for each input of one model.
        prompt_tokens: of the input, special tokens included, as the model read them.
        truncated: the input's end was left out, because it was longer than the model takes; only with `truncate`.
    """

    index: int
    values: tuple[float, ...]
    prompt_tokens: int
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """One document and its score.

    Attributes:
        index: which of the documents.
        score: the model's own; higher is better. Scores of one model compare, those of two models do not.
        prompt_tokens: of query and document, special tokens included, as the model read them.
        truncated: an end was left out, because both were longer than the model takes; only with `truncate`.
    """

    index: int
    score: float
    prompt_tokens: int
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class BatchTimings:
    """Times of a request as the engine measured them.

    Attributes:
        queue: submitted until the first input was scheduled.
        compute: from there until the last input was computed.
    """

    queue: timedelta
    compute: timedelta


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The answer to one request for vectors.

    Attributes:
        embeddings: as many as inputs, in their order.
        request_id: as given or assigned.
        model_digest: SHA-256 of the signed manifest of the model that answered, hex.
        usage: the bill, of all inputs.
        timings: where the time went.
        receipt: where the request is in the audit log.
    """

    embeddings: tuple[Embedding, ...]
    request_id: str
    model_digest: str
    usage: Usage
    timings: BatchTimings
    receipt: Receipt

    @property
    def vectors(self) -> tuple[tuple[float, ...], ...]:
        """The numbers alone, one vector for each input, in their order."""
        return tuple(embedding.values for embedding in self.embeddings)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The answer to one request for a ranking.

    Attributes:
        results: best first; as many as documents, or as were asked for with `top_n`.
        request_id: as given or assigned.
        model_digest: SHA-256 of the signed manifest of the model that answered, hex.
        usage: the bill, of the query with each document.
        timings: where the time went.
        receipt: where the request is in the audit log.
    """

    results: tuple[RankedDocument, ...]
    request_id: str
    model_digest: str
    usage: Usage
    timings: BatchTimings
    receipt: Receipt


def embed_request(
    model: str,
    inputs: str | Iterable[str | Sequence[int]],
    dimensions: int | None,
    normalize: bool,
    truncate: bool,
    options: CallOptions,
) -> api.EmbedRequest:
    """The message of one request for vectors; a text alone is one input.

    Raises:
        TypeError: an option is not one.
        ValueError: a value does not fit its field.
    """
    request = api.EmbedRequest(
        model=model, request_id=_request_id(options), dimensions=dimensions, normalize=normalize, truncate=truncate
    )
    for one in (inputs,) if isinstance(inputs, str) else inputs:
        if isinstance(one, str):
            request.inputs.add(text=one)
        else:
            request.inputs.add(token_ids=api.TokenIds(ids=one))
    return request


def rerank_request(
    model: str,
    query: str,
    documents: Iterable[str],
    top_n: int | None,
    truncate: bool,
    options: CallOptions,
) -> api.RerankRequest:
    """The message of one request for a ranking.

    Raises:
        TypeError: `documents` is a text alone, or an option is not one.
        ValueError: a value does not fit its field.
    """
    if isinstance(documents, str):
        raise TypeError("documents are several texts, not one")
    return api.RerankRequest(
        model=model, request_id=_request_id(options), query=query, documents=documents, top_n=top_n,
        truncate=truncate,
    )  # fmt: skip


def read_embeddings(response: api.EmbedResponse, trailers: Iterable[tuple[str, str | bytes]] | None) -> Embeddings:
    """The answer as a value."""
    return Embeddings(
        tuple(Embedding(e.index, tuple(e.values), e.prompt_tokens, e.truncated) for e in response.embeddings),
        response.request_id,
        response.model_digest,
        _usage(response.usage),
        _timings(response.timings),
        _receipt(trailers),
    )


def read_ranking(response: api.RerankResponse, trailers: Iterable[tuple[str, str | bytes]] | None) -> Ranking:
    """The answer as a value."""
    return Ranking(
        tuple(RankedDocument(r.index, r.score, r.prompt_tokens, r.truncated) for r in response.results),
        response.request_id,
        response.model_digest,
        _usage(response.usage),
        _timings(response.timings),
        _receipt(trailers),
    )


def _request_id(options: CallOptions) -> str:
    """Made here, so that a request sent again keeps it."""
    unknown = set(options) - set(CallOptions.__annotations__)
    if unknown:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    return options.get("request_id") or str(uuid.uuid4())


def _usage(usage: api.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens, usage.recomputed_tokens)


def _timings(timings: api.BatchTimings) -> BatchTimings:
    return BatchTimings(timings.queue.ToTimedelta(), timings.compute.ToTimedelta())


def _receipt(trailers: Iterable[tuple[str, str | bytes]] | None) -> Receipt:
    """Of an answer that is OK, which always has one."""
    return next(
        read_receipt(value) for key, value in trailers or () if key == RECEIPT_TRAILER and isinstance(value, bytes)
    )
