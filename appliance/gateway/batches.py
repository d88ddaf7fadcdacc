"""Checks every field of a request for vectors or for a ranking, and says what engine-text is asked of each input.

A message names the field and the limit, never what the client wrote.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from appliance.errors import CloisterError
from appliance.gateway.validation import (
    CheckedRequest,
    check_length,
    check_model,
    digest_of,
    empty_prompt,
    request_id_of,
)
from appliance.protos import inference_pb2 as api
from engine.protos import engine_pb2 as engine

MAX_INPUTS = 256


@dataclass(frozen=True, slots=True)
class CheckedBatch(CheckedRequest):
    """A request of many inputs.

    Attributes:
        task: what is wanted of each.
        field: of the request, that holds the inputs.
        count: of the inputs.
        prompt: what engine-text is to turn into tokens, of the input with this index; made when it is asked for,
            because each of a ranking's holds the whole query.
        truncate: an input that is too long is cut.
    """

    task: engine.Task.ValueType
    field: str
    count: int
    prompt: Callable[[int], engine.PrepareRequest]
    truncate: bool

    def check_lengths(self, max_context_tokens: int) -> None:
        """Refuse inputs that cannot fit, before anybody tokenises them, unless they are to be cut.

        Raises:
            CloisterError: CONTEXT_OVERFLOW, with the field.
        """
        for index in range(0 if self.truncate else self.count):
            try:
                check_length(self.prompt(index), max_context_tokens)
            except CloisterError as error:
                raise self.blamed(error, index) from None

    def blamed(self, error: CloisterError, index: int) -> CloisterError:
        """The error, with the input that it is about."""
        error.field = f"{self.field}[{index}]"
        error.message = f"{error.field}: {error.message}"
        return error

    def recorded(self) -> dict[str, str]:
        """What the audit log keeps: numbers, never text."""
        return {self.field: str(self.count), "truncate": str(self.truncate).lower()}


@dataclass(frozen=True, slots=True)
class CheckedEmbed(CheckedBatch):
    """A request for vectors.

    Attributes:
        dimensions: numbers of each vector to keep; None keeps all.
        normalize: scale each to length 1.
    """

    dimensions: int | None
    normalize: bool

    def recorded(self) -> dict[str, str]:
        """What the audit log keeps."""
        dimensions = {} if self.dimensions is None else {"dimensions": str(self.dimensions)}
        # A dataclass with slots is made anew, which super() without arguments does not see.
        return {**CheckedBatch.recorded(self), **dimensions, "normalize": str(self.normalize).lower()}


@dataclass(frozen=True, slots=True)
class CheckedRerank(CheckedBatch):
    """A request for a ranking.

    Attributes:
        top_n: of the best documents are told of; None of all.
    """

    top_n: int | None

    def recorded(self) -> dict[str, str]:
        """What the audit log keeps."""
        top = {} if self.top_n is None else {"top_n": str(self.top_n)}
        return {**CheckedBatch.recorded(self), **top}


def check_embed(request: api.EmbedRequest) -> CheckedEmbed:
    """A request for vectors, checked.

    Raises:
        CloisterError: INVALID_ARGUMENT with the offending field.
    """
    check_model(request.model)
    _check_count("inputs", request.inputs)
    dimensions = request.dimensions if request.HasField("dimensions") else None
    if dimensions == 0:
        raise CloisterError("INVALID_DIMENSIONS", "dimensions must be at least 1", field="dimensions")
    read: list[str | list[int]] = []
    for index, one in enumerate(request.inputs):
        if not (one.text or one.token_ids.ids):
            raise empty_prompt(f"inputs[{index}]")
        read.append(one.text or list(one.token_ids.ids))
    return CheckedEmbed(
        model=request.model,
        request_id=request_id_of(request.request_id),
        prompt_sha256=digest_of(read),
        task=engine.TASK_EMBED,
        field="inputs",
        count=len(read),
        prompt=partial(_input_of, request),
        truncate=request.truncate,
        dimensions=dimensions,
        normalize=request.normalize if request.HasField("normalize") else True,
    )


def check_rerank(request: api.RerankRequest) -> CheckedRerank:
    """A request for a ranking, checked.

    Raises:
        CloisterError: INVALID_ARGUMENT with the offending field.
    """
    check_model(request.model)
    if not request.query:
        raise empty_prompt("query")
    _check_count("documents", request.documents)
    if not all(request.documents):
        raise empty_prompt(f"documents[{list(request.documents).index('')}]")
    if request.HasField("top_n") and not request.top_n:
        raise CloisterError("INVALID_OUTPUT", "top_n must be at least 1", field="top_n")
    return CheckedRerank(
        model=request.model,
        request_id=request_id_of(request.request_id),
        prompt_sha256=digest_of([request.query, list(request.documents)]),
        task=engine.TASK_SCORE,
        field="documents",
        count=len(request.documents),
        prompt=partial(_pair_of, request),
        truncate=request.truncate,
        top_n=request.top_n if request.HasField("top_n") else None,
    )


def _input_of(request: api.EmbedRequest, index: int) -> engine.PrepareRequest:
    one = request.inputs[index]
    if one.text:
        return engine.PrepareRequest(text=one.text, task=engine.TASK_EMBED, truncate=request.truncate)
    ids = engine.TokenIds(ids=one.token_ids.ids)
    return engine.PrepareRequest(token_ids=ids, task=engine.TASK_EMBED, truncate=request.truncate)


def _pair_of(request: api.RerankRequest, index: int) -> engine.PrepareRequest:
    pair = engine.Pair(query=request.query, document=request.documents[index])
    return engine.PrepareRequest(pair=pair, task=engine.TASK_SCORE, truncate=request.truncate)


def _check_count(field: str, inputs: Sequence[object]) -> None:
    if not inputs:
        raise empty_prompt(field)
    if len(inputs) > MAX_INPUTS:
        raise CloisterError(
            "TOO_MANY_INPUTS", f"a request has at most {MAX_INPUTS} {field}, this one {len(inputs)}; send several",
            metadata={"max_inputs": str(MAX_INPUTS)}, field=field,
        )  # fmt: skip
