"""Checks every field of a request before anybody else sees it, and fills in what was left out.

A message names the field and the limit, never what the client wrote.
"""

import hashlib
import json
import math
import re
import secrets
import uuid
from dataclasses import dataclass

from google.protobuf.message import Message

from appliance.errors import CloisterError
from appliance.protos import inference_pb2 as api
from engine.protos import engine_pb2 as engine

MAX_REQUEST_BYTES = 1 << 20
MAX_TEMPERATURE = 100.0
MAX_STOPS = 16
MAX_STOP_BYTES = 128
MAX_MODEL_NAME_BYTES = 256
# No vocabulary in use has a longer token (cl100k, o200k, Llama 3 and Qwen: 128 spaces).
MAX_TOKEN_BYTES = 128
ROLES = ("system", "user", "assistant")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request whose every field is known to be sound.

    Attributes:
        model: the alias asked for.
        request_id: a UUID in lower case, as given or assigned.
        prompt: what engine-text is to turn into tokens.
        prompt_sha256: of the text in UTF-8, or of the JSON array of token ids or of [role, content] pairs, without
            white space; anybody who has the prompt can compute it again.
        temperature: 0 is greedy.
        top_p: in (0, 1].
        top_k: 0 keeps all.
        seed: as given or drawn.
        max_tokens: at least 1; None takes what the context leaves.
        stopping: stop strings, stop ids and their flags.
        return_token_ids: deltas carry token ids too.
    """

    model: str
    request_id: str
    prompt: engine.PrepareRequest
    prompt_sha256: bytes
    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int | None
    stopping: api.StopCriteria
    return_token_ids: bool

    def parameters(self, max_tokens: int) -> dict[str, str]:
        """What the audit log keeps of the parameters: numbers and counts, never text."""
        return {
            "temperature": f"{self.temperature:.6g}",
            "top_p": f"{self.top_p:.6g}",
            "top_k": str(self.top_k),
            "seed": str(self.seed),
            "max_tokens": str(max_tokens),
            "stop": str(len(self.stopping.stop)),
            "stop_token_ids": str(len(self.stopping.stop_token_ids)),
            "ignore_eos": str(self.stopping.ignore_eos).lower(),
        }


def check_generate(request: api.GenerateRequest) -> CheckedRequest:
    """A completion request, checked.

    Raises:
        CloisterError: INVALID_ARGUMENT with the offending field.
    """
    _check_size(request)
    if request.HasField("token_ids"):
        ids = list(request.token_ids.ids)
        if not ids:
            raise _empty("token_ids.ids")
        return _checked(request, engine.PrepareRequest(token_ids=engine.TokenIds(ids=ids)), _digest(ids))
    if not request.text:
        raise _empty("text")
    digest = hashlib.sha256(request.text.encode()).digest()
    return _checked(request, engine.PrepareRequest(text=request.text), digest)


def check_chat(request: api.ChatRequest) -> CheckedRequest:
    """A chat request, checked.

    Raises:
        CloisterError: INVALID_ARGUMENT with the offending field.
    """
    _check_size(request)
    messages = request.messages
    if not messages or not messages[-1].content:
        raise _empty("messages")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise CloisterError(
                "INVALID_ROLE", f"a role is one of {', '.join(ROLES)}", field=f"messages[{index}].role"
            )
    if messages[-1].role != "user":
        raise CloisterError(
            "INVALID_ROLE", "the last message must be the user's", field=f"messages[{len(messages) - 1}].role"
        )
    turns = [engine.ChatMessage(role=m.role, content=m.content) for m in messages]
    prompt = engine.PrepareRequest(conversation=engine.Conversation(messages=turns))
    return _checked(request, prompt, _digest([[m.role, m.content] for m in messages]))


def room_for_answer(asked: int | None, prompt_tokens: int, max_context_tokens: int) -> int:
    """Most tokens the answer may have.

    Raises:
        CloisterError: CONTEXT_OVERFLOW; the prompt, or the prompt and the answer asked for, do not fit.
    """
    left = max_context_tokens - prompt_tokens
    if left < (asked or 1):
        wanted = f" and {asked} for the answer" if asked else " and at least one for the answer"
        raise CloisterError(
            "CONTEXT_OVERFLOW",
            f"{prompt_tokens} tokens of prompt{wanted} do not fit the model's context of {max_context_tokens}; "
            "shorten the prompt or ask for fewer tokens",
            metadata={"prompt_tokens": str(prompt_tokens), "max_context_tokens": str(max_context_tokens)},
            field="stopping.max_tokens" if asked and left >= 1 else None,
        )
    return asked or left


def check_length(prompt: engine.PrepareRequest, max_context_tokens: int) -> None:
    """Refuse a prompt that cannot fit, before anybody tokenises it: a token has `MAX_TOKEN_BYTES` at the most.

    Raises:
        CloisterError: CONTEXT_OVERFLOW.
    """
    count, most, what = len(prompt.token_ids.ids), max_context_tokens, "token ids"
    if not prompt.HasField("token_ids"):
        contents = [message.content for message in prompt.conversation.messages] or [prompt.text]
        count, most, what = sum(len(text.encode()) for text in contents), most * MAX_TOKEN_BYTES, "bytes"
    if count > most:
        raise CloisterError(
            "CONTEXT_OVERFLOW",
            f"the prompt has {count} {what}, and more than {most} cannot fit the model's context of "
            f"{max_context_tokens} tokens; shorten it",
            metadata={
                f"prompt_{what.replace(' ', '_')}": str(count),
                "max_context_tokens": str(max_context_tokens),
            },
        )


def request_id_of(given: str) -> str:
    """A request's id in lower case, or a new one when none was given.

    Raises:
        CloisterError: INVALID_REQUEST_ID.
    """
    if not given:
        return str(uuid.uuid4())
    if not _UUID.fullmatch(given):
        raise CloisterError(
            "INVALID_REQUEST_ID", "a request id is a UUID like 123e4567-e89b-12d3-a456-426614174000",
            field="request_id",
        )  # fmt: skip
    return given.lower()


def _checked(
    request: api.GenerateRequest | api.ChatRequest, prompt: engine.PrepareRequest, digest: bytes
) -> CheckedRequest:
    """The fields that both kinds of request have."""
    if not request.model or len(request.model.encode()) > MAX_MODEL_NAME_BYTES:
        raise CloisterError("MODEL_MISSING", "name a model; ListModels has the names", field="model")
    _check_sampling(request.sampling)
    _check_stopping(request.stopping)
    sampling, stopping = request.sampling, request.stopping
    return CheckedRequest(
        model=request.model,
        request_id=request_id_of(request.request_id),
        prompt=prompt,
        prompt_sha256=digest,
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        stopping=stopping,
        return_token_ids=request.output.return_token_ids,
    )


def _check_size(request: Message) -> None:
    size = request.ByteSize()
    if size > MAX_REQUEST_BYTES:
        raise CloisterError(
            "REQUEST_TOO_LARGE",
            f"a request may have {MAX_REQUEST_BYTES} bytes, this one has {size}; shorten the prompt",
            metadata={"request_bytes": str(size), "max_request_bytes": str(MAX_REQUEST_BYTES)},
        )


def _check_sampling(sampling: api.SamplingParams) -> None:
    temperature = sampling.temperature
    if not math.isfinite(temperature) or not 0 <= temperature <= MAX_TEMPERATURE:
        raise CloisterError(
            "INVALID_SAMPLING", f"temperature must be a number from 0 to {MAX_TEMPERATURE:g}",
            field="sampling.temperature",
        )  # fmt: skip
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        raise CloisterError(
            "INVALID_SAMPLING", "top_p must be greater than 0 and at most 1", field="sampling.top_p"
        )


def _check_stopping(stopping: api.StopCriteria) -> None:
    if stopping.HasField("max_tokens") and stopping.max_tokens < 1:
        raise CloisterError("INVALID_MAX_TOKENS", "max_tokens must be at least 1", field="stopping.max_tokens")
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


def _empty(field: str) -> CloisterError:
    return CloisterError("EMPTY_PROMPT", "there is nothing to answer; give a prompt", field=field)


def _digest(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()).digest()
