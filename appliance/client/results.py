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
class TopLogprob:
    """One of the likeliest tokens, and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the model thought of one token, before bias, penalties, temperature and truncation.

    Attributes:
        token_id: the token that stands there.
        logprob: natural logarithm of its probability.
        rank: 1 for the likeliest token.
        top: the likeliest tokens, as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step brought.

    Attributes:
        index: which of the n answers.
        text: whole characters; empty while one, or a possible stop string, is incomplete.
        token_ids: only with `return_token_ids`.
        logprobs: of the tokens of this delta; only with `logprobs`.
        prompt_logprobs: of the prompt's tokens from the second on, before any answer; only with `prompt_logprobs`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """Why an answer ended.

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
    """Token counts; prompt and completion are what is charged.

    Attributes:
        prompt_tokens: template included; counted once, however many answers there are.
        completion_tokens: generated in all answers, end tokens included.
        cached_prompt_tokens: those of the prompt that were taken from the tenant's prefix cache.
        recomputed_tokens: computed again because their memory was needed meanwhile; never charged.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int = 0
    recomputed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Times of the first answer as the engine measured them.

    Attributes:
        queue: submitted to first scheduled.
        prefill: first scheduled to first token.
        decode: first to last token.
        time_to_first_token: submitted to the first token of any answer.
        preemptions: times the request had to give up its memory and begin again.
    """

    queue: timedelta
    prefill: timedelta
    decode: timedelta
    time_to_first_token: timedelta
    preemptions: int = 0


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
class Choice:
    """One whole answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finished: Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """All answers to one request, collected.

    Attributes:
        choices: the n answers by index; `text`, `token_ids`, `logprobs` and `finished` are those of the first.
        prompt_logprobs: of the prompt's tokens from the second on; only with `prompt_logprobs`.
    """

    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    accepted: Accepted
    completed: Completed
    receipt: Receipt

    @property
    def text(self) -> str:
        """The answer."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Its tokens; only with `return_token_ids`."""
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """One for each of its tokens; only with `logprobs`."""
        return self.choices[0].logprobs

    @property
    def finished(self) -> Finished:
        """Why it ended."""
        return self.choices[0].finished


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the tenant may use.

    Attributes:
        name: the alias, for `chat`, `generate`, `embed` and `rerank`.
        model_digest: SHA-256 of the signed manifest behind it at present, hex.
        max_context_tokens: prompt and answer together.
        capabilities: what it answers: generate, chat, embed, rerank.
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


def read_delta(event: api.Delta) -> Delta:
    """The event as a value."""
    return Delta(
        event.index,
        event.text,
        tuple(event.token_ids),
        tuple(map(_read_logprob, event.logprobs)),
        tuple(map(_read_logprob, event.prompt_logprobs)),
    )


def _read_logprob(of: api.TokenLogprob) -> TokenLogprob:
    top = tuple(TopLogprob(one.token_id, one.logprob) for one in of.top)
    return TokenLogprob(of.token_id, of.logprob, of.rank, top)


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
    usage, times = event.usage, event.timings
    return Completed(
        Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens, usage.recomputed_tokens),
        Timings(
            times.queue.ToTimedelta(),
            times.prefill.ToTimedelta(),
            times.decode.ToTimedelta(),
            times.time_to_first_token.ToTimedelta(),
            times.preemptions,
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
