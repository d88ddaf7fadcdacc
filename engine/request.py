"""A request as the engine sees it: tokens, how to sample, when to stop, and one progress counter.

There are no prefill and decode phases: `num_computed` chases `num_tokens`, and whatever lies between them is to be
computed. Chunked prefill, prefix hits and recomputation after preemption are the same subtraction.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.errors import EngineError

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
"""Likeliest tokens that can be reported beside a token; the public API takes no more."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn from logits, in this order: bias, penalties, temperature, min-p, top-k, top-p.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches this; in (0, 1].
        seed: unsigned 64 bit; with the token's position it determines every draw.
        min_p: drop tokens less likely than this share of the likeliest; in [0, 1], 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or answer; 1: off.
        presence_penalty: taken off the logit of every token in the answer.
        frequency_penalty: taken off a token's logit for each time it is in the answer.
        logit_bias: pairs of token and number added to its logit; each token once.

    Source: Keskar et al., "CTRL", 2019 (repetition penalty); Nguyen et al., "Turning Up the Heat", 2024 (min-p).

    Raises:
        EngineError: INVALID_SAMPLING.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature must be finite and >= 0")
        _require(self.top_k >= 0, "top_k must be >= 0")
        _require(0 < self.top_p <= 1, "top_p must lie in (0, 1]")
        _require(0 <= self.seed <= MAX_SEED, "seed must be an unsigned 64-bit number")
        _require(0 <= self.min_p <= 1, "min_p must lie in [0, 1]")
        _require(0 < self.repetition_penalty < math.inf, "repetition_penalty must be finite and > 0")
        numbers = (self.presence_penalty, self.frequency_penalty, *(bias for _, bias in self.logit_bias))
        _require(all(map(math.isfinite, numbers)), "penalties and biases must be finite")
        _require(len(dict(self.logit_bias)) == len(self.logit_bias), "logit_bias names a token twice")

    @property
    def uses_history(self) -> bool:
        """Whether a draw depends on which tokens prompt and answer hold."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class StopCriteria:
    """When a request ends.

    Attributes:
        max_tokens: most tokens to generate; at least 1.
        strings: text that ends the answer when it appears; none is empty.
        token_ids: tokens that end the answer, besides the model's own end tokens.
        include_stop: keep the matched stop string (or stop token's text) in the answer.
        ignore_eos: the model's own end tokens do not end the answer.
        min_tokens: end and stop tokens are not drawn, and stop strings not looked for, before this many tokens.

    Raises:
        EngineError: INVALID_STOP.
    """

    max_tokens: int
    strings: tuple[str, ...] = ()
    token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not all(self.strings):
            raise EngineError("INVALID_STOP", "max_tokens must be at least 1 and no stop string may be empty")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise EngineError("INVALID_STOP", "min_tokens must lie between 0 and max_tokens")


class Task(enum.Enum):
    """What is wanted of a request."""

    GENERATE = "generate"
    EMBED = "embed"
    SCORE = "score"


class EndReason(enum.Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class End:
    """The end of one request.

    Attributes:
        reason: why.
        stop_string: the stop string that matched, else empty.
        stop_token_id: the stop or end token that matched, else None.
        error_code: stable code, with reason ERROR.
        error_message: what was wrong, with reason ERROR; never text of the request.
        prompt_tokens: prompt tokens computed, or taken from the prefix cache.
        completion_tokens: tokens generated, an end token included.
        queue_ns: from submission to first scheduled.
        prefill_ns: from first scheduled to first token, or to the vector or score.
        decode_ns: from first to last token.
        cached_prompt_tokens: prompt tokens taken from the prefix cache when the request was first admitted.
        recomputed_tokens: tokens computed again after the request had given up its pages.
        preemptions: times it gave up its pages.
    """

    reason: EndReason
    stop_string: str = ""
    stop_token_id: int | None = None
    error_code: str = ""
    error_message: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    cached_prompt_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """One sequence of tokens that grows until it ends.

    Attributes:
        handle: unique among the requests the engine holds; chosen by the caller.
        prompt: its tokens; never empty.
        sampling: how tokens are drawn.
        stop: when it ends.
        scope: the engine's opaque name of the owner; pages are scrubbed when they change scope.
        salt: roots the owner's prefix cache; empty shares nothing with any other request.
        weight: the scope's share of the tokens, beside those of the other scopes that wait.
        logprobs: how many likeliest tokens to report beside each generated one; None reports nothing.
        prompt_logprobs: the same for each prompt token but the first.
        follows: handle of a request with the same prompt, whose pages this one shares: it is not admitted before
            that one's prompt is computed, or that one is gone.
        task: what is wanted; of a vector or score nothing is generated, and `sampling` and `stop` say nothing.
        type_ids: the segment of each prompt token, for an encoder; empty where all are of the first.
        tokens: prompt and generated tokens.
        limit: most tokens to generate, the scheduler lowers it to what the context allows; 0 with another task.
        num_computed: tokens whose keys and values are in the KV pages.
        reached: most tokens that `num_computed` has ever been; what is computed below it is computed again.
        blocks: KV pages of the full-attention group, in token order.
        slot: index into per-request device state, -1 while waiting.
        num_scored: prompt tokens whose log probabilities were reported; of those from the second on.
        cached_prompt_tokens, recomputed_tokens, preemptions: as in `End`.

    Raises:
        EngineError: EMPTY_PROMPT, INVALID_SAMPLING (weight, logprobs), INVALID_TYPE_IDS.
    """

    handle: int
    prompt: Sequence[int]
    sampling: SamplingParams
    stop: StopCriteria
    scope: str = ""
    salt: bytes = b""
    weight: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    follows: int | None = None
    task: Task = Task.GENERATE
    type_ids: Sequence[int] = ()
    tokens: list[int] = field(init=False)
    limit: int = field(init=False)
    num_computed: int = field(init=False, default=0)
    reached: int = field(init=False, default=0)
    blocks: list[int] = field(init=False, default_factory=list)
    slot: int = field(init=False, default=-1)
    num_scored: int = field(init=False, default=0)
    cached_prompt_tokens: int = field(init=False, default=0)
    recomputed_tokens: int = field(init=False, default=0)
    preemptions: int = field(init=False, default=0)
    submitted_ns: int = field(init=False, default=0)
    scheduled_ns: int = field(init=False, default=0)
    first_token_ns: int = field(init=False, default=0)
    last_token_ns: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise EngineError("EMPTY_PROMPT", "a request needs at least one prompt token")
        _require(self.weight >= 1, "weight must be at least 1")
        for wanted in (self.logprobs, self.prompt_logprobs):
            _require(wanted is None or 0 <= wanted <= MAX_LOGPROBS, f"logprobs must lie in 0 to {MAX_LOGPROBS}")
        if self.type_ids and len(self.type_ids) != len(self.prompt):
            raise EngineError("INVALID_TYPE_IDS", f"{len(self.type_ids)} segments for {len(self.prompt)} tokens")
        self.tokens = list(self.prompt)
        self.limit = self.stop.max_tokens if self.task is Task.GENERATE else 0

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens so far."""
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Generated tokens so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def num_pending(self) -> int:
        """Tokens not yet computed."""
        return len(self.tokens) - self.num_computed


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise EngineError("INVALID_SAMPLING", message)
