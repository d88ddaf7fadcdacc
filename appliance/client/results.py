"""What an answer consists of, as plain frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from appliance.protos import inference_pb2 as api


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request was admitted and recorded; an error after this is never a refusal.

    Attributes:
        request_id: as given or assigned.
        model_digest: SHA-256 of the signed manifest of the model that answers, hex.
        prompt_tokens: template included.
        seed: in use; the same seed, model and input give the same output.
    """

    request_id: str
    model_digest: str
    prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Why the generation ended.

    Attributes:
        reason: stop or length.
        stop_string: the stop string that matched, if one did.
        stop_token_id: the stop token that matched, or the model's end token, if one did.
    """

    reason: str
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts: the prompt with its template, and what was generated, the end token included."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Times as the engine measured them."""

    queue: timedelta
    prefill: timedelta
    decode: timedelta
    time_to_first_token: timedelta


@dataclass(frozen=True, slots=True)
class Completed:
    """The bill and the times."""

    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Receipt:
    """The appliance's promise that the request is in its audit log: keep it, and an auditor can find the record.

    Attributes:
        request_id: the request.
        audit_sequence: sequence number of its outcome record.
        leaf_hash: RFC 9162 leaf hash of that record, 32 bytes.
    """

    request_id: str
    audit_sequence: int
    leaf_hash: bytes


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer, collected."""

    text: str
    token_ids: tuple[int, ...]
    accepted: Accepted
    finished: Finished
    completed: Completed
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the tenant may use.

    Attributes:
        name: the alias, for `chat` and `generate`.
        model_digest: SHA-256 of the signed manifest behind it at present, hex.
        max_context_tokens: prompt and answer together.
        capabilities: generate, chat.
        ready: requests are answered now.
    """

    name: str
    model_digest: str
    max_context_tokens: int
    capabilities: tuple[str, ...]
    ready: bool


_REASONS: Mapping[int, str] = {api.FINISH_REASON_STOP: "stop", api.FINISH_REASON_LENGTH: "length"}


def read_accepted(event: api.Accepted) -> Accepted:
    """The event as a value."""
    return Accepted(event.request_id, event.model_digest, event.prompt_tokens, event.seed)


def read_finished(event: api.Finished) -> Finished:
    """The event as a value; a reason newer than this client is `unknown`."""
    matched = event.WhichOneof("matched")
    return Finished(
        _REASONS.get(event.reason, "unknown"),
        event.stop_string if matched == "stop_string" else None,
        event.stop_token_id if matched == "stop_token_id" else None,
    )


def read_completed(event: api.Completed) -> Completed:
    """The event as a value."""
    times = event.timings
    return Completed(
        Usage(event.usage.prompt_tokens, event.usage.completion_tokens),
        Timings(
            times.queue.ToTimedelta(),
            times.prefill.ToTimedelta(),
            times.decode.ToTimedelta(),
            times.time_to_first_token.ToTimedelta(),
        ),
    )


def read_receipt(raw: bytes) -> Receipt:
    """The trailer as a value."""
    receipt = api.Receipt.FromString(raw)
    return Receipt(receipt.request_id, receipt.audit_sequence, receipt.leaf_hash)


def read_models(response: api.ListModelsResponse) -> tuple[Model, ...]:
    """The models, by name."""
    return tuple(
        Model(m.name, m.model_digest, m.max_context_tokens, tuple(m.capabilities), m.ready)
        for m in response.models
    )
