"""Checks every field of a request before anybody else sees it, and fills in what was left out.

A message names the field and the limit, never what the client wrote.
"""

import hashlib
import json
import re
import uuid
from dataclasses import dataclass

from google.protobuf.message import Message

from appliance.errors import CloisterError
from appliance.gateway.parameters import Parameters, check_parameters
from appliance.protos import inference_pb2 as api
from engine.protos import engine_pb2 as engine

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
        prompt_sha256: of the text in UTF-8, or of JSON without white space: an array of token ids, of [role,
            content] pairs, of the inputs of vectors (texts or arrays of ids), or [query, [documents]]; anybody who
            has the prompt can compute it again.
    """

    model: str
    request_id: str
    prompt_sha256: bytes


@dataclass(frozen=True, slots=True)
class CheckedPrompt(CheckedRequest):
    """A request for text.

    Attributes:
        prompt: what engine-text is to turn into tokens.
        parameters: how the answers are drawn, ended and reported.
    """

    prompt: engine.PrepareRequest
    parameters: Parameters


def check_size(request: Message, most: int) -> None:
    """Refuse a request of more than `most` bytes.

    Raises:
        CloisterError: REQUEST_TOO_LARGE.
    """
    size = request.ByteSize()
    if size > most:
        raise CloisterError(
            "REQUEST_TOO_LARGE",
            f"a request may have {most} bytes, this one has {size}; shorten the prompt",
            metadata={"request_bytes": str(size), "max_request_bytes": str(most)},
        )


def check_generate(request: api.GenerateRequest) -> CheckedPrompt:
    """A completion request, checked.

    Raises:
        CloisterError: INVALID_ARGUMENT with the offending field.
    """
    if request.HasField("token_ids"):
        ids = list(request.token_ids.ids)
        if not ids:
            raise empty_prompt("token_ids.ids")
        return _checked(request, engine.PrepareRequest(token_ids=engine.TokenIds(ids=ids)), digest_of(ids))
    if not request.text:
        raise empty_prompt("text")
    digest = hashlib.sha256(request.text.encode()).digest()
    return _checked(request, engine.PrepareRequest(text=request.text), digest)


def check_chat(request: api.ChatRequest) -> CheckedPrompt:
    """A chat request, checked.

    Raises:
        CloisterError: INVALID_ARGUMENT with the offending field.
    """
    messages = request.messages
    if not messages or not messages[-1].content:
        raise empty_prompt("messages")
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
    return _checked(request, prompt, digest_of([[m.role, m.content] for m in messages]))


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
        messages = [message.content for message in prompt.conversation.messages]
        contents = messages or [prompt.text, prompt.pair.query, prompt.pair.document]
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


def check_model(name: str) -> None:
    """Refuse a request that does not name a model.

    Raises:
        CloisterError: MODEL_MISSING.
    """
    if not name or len(name.encode()) > MAX_MODEL_NAME_BYTES:
        raise CloisterError("MODEL_MISSING", "name a model; ListModels has the names", field="model")


def _checked(
    request: api.GenerateRequest | api.ChatRequest, prompt: engine.PrepareRequest, digest: bytes
) -> CheckedPrompt:
    """The fields that both kinds of request have."""
    check_model(request.model)
    return CheckedPrompt(
        model=request.model,
        request_id=request_id_of(request.request_id),
        prompt=prompt,
        prompt_sha256=digest,
        parameters=check_parameters(request),
    )


def empty_prompt(field: str) -> CloisterError:
    """There is nothing in a field that must hold something."""
    return CloisterError("EMPTY_PROMPT", "there is nothing to answer; give a prompt", field=field)


def digest_of(value: object) -> bytes:
    """SHA-256 of `value` as JSON without white space."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()).digest()
