"""What a caller may ask for, and the message made of it."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from appliance.client.results import Message
from appliance.protos import inference_pb2 as api

DEFAULT_TIMEOUT_S = 120.0
MAX_ANSWERS = 8


class Options(TypedDict, total=False):
    """How to answer; what is left out takes the server's default.

    Keys:
        temperature: 0 is greedy; default 1, at most 100.
        top_p: keep the smallest set of tokens whose probability reaches this; in (0, 1].
        top_k: keep this many most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the likeliest; in [0, 1].
        frequency_penalty: taken off a token's logit for each time it is in the answer; -2 to 2.
        presence_penalty: taken off the logit of every token that is in the answer; -2 to 2.
        repetition_penalty: divides positive, multiplies negative logits of tokens in prompt or answer; in (0, 10].
        logit_bias: token id to a number added to its logit; at most 1024, each -100 to 100.
        seed: the same seed, model and input give the same output; drawn by the server when left out.
        n: answers to the same prompt, 1 to 8; the prompt is charged once, and each is drawn by itself.
        max_tokens: most tokens of each answer; default what the model's context leaves.
        min_tokens: no answer ends before this many tokens; at most max_tokens.
        stop: at most 16 strings of 1 to 128 bytes; generation ends before the first that appears.
        stop_token_ids: at most 16 ids.
        include_stop: keep the matched stop string in the text.
        ignore_eos: do not stop at the model's end token.
        logprobs: log probability of each generated token and of this many likeliest ones; 0 to 20.
        prompt_logprobs: the same for each token of the prompt but the first; 0 to 20.
        return_token_ids: also collect the ids of the generated tokens.
        request_id: a UUID; a request sent again under the same id is refused, never answered or charged twice.
        timeout: seconds; default 120.
        retry: send again while the appliance is not available (loading, restarting), four times at the most and
            never past the timeout; default True. A request that was admitted is never sent again.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    return_token_ids: bool
    request_id: str
    timeout: float | None
    retry: bool


_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "seed", "n",
)  # fmt: skip
_STOPPING = ("max_tokens", "min_tokens", "include_stop", "ignore_eos")
_OUTPUT = ("logprobs", "prompt_logprobs", "return_token_ids")


def answers_of(options: Options) -> int:
    """How many answers to expect; what the server refuses is not for us to judge."""
    return max(1, min(options.get("n") or 1, MAX_ANSWERS))


def generate_request(
    model: str, text: str | None, token_ids: Iterable[int] | None, options: Options
) -> api.GenerateRequest:
    """The message of one completion request.

    Raises:
        ValueError: neither or both of `text` and `token_ids` are given, or a value does not fit its field.
    """
    if (text is None) == (token_ids is None):
        raise ValueError("give either text or token_ids")
    request = api.GenerateRequest(model=model)
    if text is not None:
        request.text = text
    else:
        request.token_ids.CopyFrom(api.TokenIds(ids=token_ids))
    _fill(request, options)
    return request


def chat_request(model: str, messages: Iterable[Message | Mapping[str, str]], options: Options) -> api.ChatRequest:
    """The message of one chat request.

    Raises:
        ValueError: a message has other keys than role and content, or a value does not fit its field.
    """
    request = api.ChatRequest(model=model, messages=[_message(m) for m in messages])
    _fill(request, options)
    return request


def _message(message: Message | Mapping[str, str]) -> api.ChatMessage:
    if isinstance(message, Message):
        return api.ChatMessage(role=message.role, content=message.content)
    if set(message) != {"role", "content"}:
        raise ValueError("a message has the keys role and content, and no others")
    return api.ChatMessage(role=message["role"], content=message["content"])


def _fill(request: api.GenerateRequest | api.ChatRequest, options: Options) -> None:
    """Put the options where they belong; the id is made here, so that a request sent again keeps it."""
    unknown = set(options) - set(Options.__annotations__)
    if unknown:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    request.request_id = options.get("request_id") or str(uuid.uuid4())
    for part, names in ((request.sampling, _SAMPLING), (request.stopping, _STOPPING), (request.output, _OUTPUT)):
        for name in names:
            if (value := options.get(name)) is not None:
                setattr(part, name, value)
    request.sampling.logit_bias.update(options.get("logit_bias") or {})
    request.stopping.stop.extend(options.get("stop") or ())
    request.stopping.stop_token_ids.extend(options.get("stop_token_ids") or ())
