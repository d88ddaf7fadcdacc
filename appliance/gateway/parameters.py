"""How an answer is drawn, ended and reported: every number checked, and what was left out filled in.

A message names the field and the limit, never what the client wrote.
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from appliance.errors import CloisterError
from appliance.protos import inference_pb2 as api
from engine.protos import engine_pb2 as engine

MAX_STOPS = 16
MAX_STOP_BYTES = 128
MAX_ANSWERS = 8
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_LOGPROBS = 20

# What each number may be, in the words of the refusal. None of them admits NaN or infinity.
_RANGES: MappingProxyType[str, tuple[Callable[[float], bool], str]] = MappingProxyType(
    {
        "temperature": (lambda x: 0 <= x <= 100, "from 0 to 100"),
        "top_p": (lambda x: 0 < x <= 1, "greater than 0 and at most 1"),
        "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
        "frequency_penalty": (lambda x: -2 <= x <= 2, "from -2 to 2"),
        "presence_penalty": (lambda x: -2 <= x <= 2, "from -2 to 2"),
        "repetition_penalty": (lambda x: 0 < x <= 10, "greater than 0 and at most 10"),
        "n": (lambda x: 1 <= x <= MAX_ANSWERS, f"from 1 to {MAX_ANSWERS}"),
    }
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a request asks of the engine besides the prompt, known to be sound.

    Attributes:
        temperature: 0 is greedy.
        top_p: in (0, 1].
        top_k: 0 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        frequency_penalty, presence_penalty: -2 to 2; 0 is off.
        repetition_penalty: in (0, 10]; 1 is off.
        logit_bias: token and number, by token.
        seed: as given or drawn.
        seed_given: the client chose it.
        n: answers to the prompt.
        max_tokens: of each answer, at least 1; None takes what the context leaves.
        stopping: stop strings, stop ids, min_tokens and flags.
        logprobs, prompt_logprobs: how many likeliest tokens to report; None reports nothing.
        return_token_ids: deltas carry token ids too.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    seed: int
    seed_given: bool
    n: int
    max_tokens: int | None
    stopping: api.StopCriteria
    logprobs: int | None
    prompt_logprobs: int | None
    return_token_ids: bool

    def recorded(self, max_tokens: int) -> dict[str, str]:
        """What the audit log keeps: numbers and counts, never text; what is off by default only where it is on."""
        always = {
            "temperature": f"{self.temperature:.6g}",
            "top_p": f"{self.top_p:.6g}",
            "top_k": str(self.top_k),
            "seed": str(self.seed),
            "max_tokens": str(max_tokens),
            "stop": str(len(self.stopping.stop)),
            "stop_token_ids": str(len(self.stopping.stop_token_ids)),
            "ignore_eos": str(self.stopping.ignore_eos).lower(),
        }
        return {**always, **self._recorded_when_on()}

    def _recorded_when_on(self) -> dict[str, str]:
        numbers = {
            "min_p": (self.min_p, 0),
            "frequency_penalty": (self.frequency_penalty, 0),
            "presence_penalty": (self.presence_penalty, 0),
            "repetition_penalty": (self.repetition_penalty, 1),
            "logit_bias": (len(self.logit_bias), 0),
            "n": (self.n, 1),
            "min_tokens": (self.stopping.min_tokens, 0),
            "logprobs": (self.logprobs, None),
            "prompt_logprobs": (self.prompt_logprobs, None),
        }
        return {
            name: f"{value:.6g}" for name, (value, off) in numbers.items() if value is not None and value != off
        }

    def submission(self, scope: str, prompt: list[int], max_tokens: int) -> engine.Submit:
        """The request for the worker; the salt and the weight are still to come."""
        return engine.Submit(
            scope=scope,
            token_ids=prompt,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=[engine.LogitBias(token_id=token, bias=bias) for token, bias in self.logit_bias],
            seed=self.seed,
            n=self.n,
            max_tokens=max_tokens,
            min_tokens=self.stopping.min_tokens,
            stop=self.stopping.stop,
            stop_token_ids=self.stopping.stop_token_ids,
            include_stop=self.stopping.include_stop,
            ignore_eos=self.stopping.ignore_eos,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


def check_parameters(request: api.GenerateRequest | api.ChatRequest) -> Parameters:
    """The sampling, stopping and output fields of a request, checked.

    Raises:
        CloisterError: INVALID_SAMPLING, INVALID_STOP, INVALID_MAX_TOKENS or INVALID_OUTPUT, with the field.
    """
    sampling, stopping, output = request.sampling, request.stopping, request.output
    _check_sampling(sampling)
    _check_stopping(stopping)
    _check_output(output)
    return Parameters(
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
        seed_given=sampling.HasField("seed"),
        n=sampling.n or 1,
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        stopping=stopping,
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
        return_token_ids=output.return_token_ids,
    )


def check_min_tokens(min_tokens: int, max_tokens: int) -> None:
    """Refuse an answer that must be longer than it may be.

    Raises:
        CloisterError: INVALID_STOP.
    """
    if min_tokens > max_tokens:
        raise CloisterError(
            "INVALID_STOP",
            f"min_tokens may be at most max_tokens, or what the context leaves for the answer: {max_tokens}",
            metadata={"max_tokens": str(max_tokens)},
            field="stopping.min_tokens",
        )


def _check_sampling(sampling: api.SamplingParams) -> None:
    for name, (fits, words) in _RANGES.items():
        if sampling.HasField(name) and not fits(getattr(sampling, name)):  # type: ignore[arg-type]  # names of fields
            kind = "a whole number" if name == "n" else "a number"
            raise CloisterError("INVALID_SAMPLING", f"{name} must be {kind} {words}", field=f"sampling.{name}")
    if len(sampling.logit_bias) > MAX_BIASES:
        raise CloisterError(
            "INVALID_SAMPLING", f"at most {MAX_BIASES} biases",
            metadata={"max_biases": str(MAX_BIASES)}, field="sampling.logit_bias",
        )  # fmt: skip
    if not all(math.fabs(bias) <= MAX_BIAS for bias in sampling.logit_bias.values()):
        raise CloisterError(
            "INVALID_SAMPLING", f"a bias must be a number from -{MAX_BIAS:g} to {MAX_BIAS:g}",
            field="sampling.logit_bias",
        )  # fmt: skip


def _check_stopping(stopping: api.StopCriteria) -> None:
    if stopping.HasField("max_tokens"):
        if stopping.max_tokens < 1:
            raise CloisterError("INVALID_MAX_TOKENS", "max_tokens must be at least 1", field="stopping.max_tokens")
        check_min_tokens(stopping.min_tokens, stopping.max_tokens)
    if len(stopping.stop) > MAX_STOPS:
        raise CloisterError("INVALID_STOP", f"at most {MAX_STOPS} stop strings", field="stopping.stop")
    if len(stopping.stop_token_ids) > MAX_STOPS:
        raise CloisterError("INVALID_STOP", f"at most {MAX_STOPS} stop token ids", field="stopping.stop_token_ids")
    for index, text in enumerate(stopping.stop):
        if not 0 < len(text.encode()) <= MAX_STOP_BYTES:
            raise CloisterError(
                "INVALID_STOP",
                f"a stop string has 1 to {MAX_STOP_BYTES} bytes of UTF-8",
                field=f"stopping.stop[{index}]",
            )


def _check_output(output: api.OutputOptions) -> None:
    for name, count in (("logprobs", output.logprobs), ("prompt_logprobs", output.prompt_logprobs)):
        if count > MAX_LOGPROBS:
            raise CloisterError(
                "INVALID_OUTPUT", f"{name} must be a whole number from 0 to {MAX_LOGPROBS}",
                metadata={"max_logprobs": str(MAX_LOGPROBS)}, field=f"output.{name}",
            )  # fmt: skip
