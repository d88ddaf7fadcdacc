"""Between the protocol's messages and the engine's own types."""

import hashlib
from collections.abc import Iterable, Sequence

from engine.errors import EngineError
from engine.loop import StepRow
from engine.options import EngineOptions
from engine.plan import TokenLogprob
from engine.protos import engine_pb2
from engine.request import End, EndReason, Request, SamplingParams, StopCriteria, Task

MAX_ANSWERS = 64
"""Answers to one prompt that one Submit may ask for."""

MAX_BIASES = 1024
"""Tokens that one Submit may name in logit_bias."""

_REASONS = {
    EndReason.STOP: engine_pb2.END_REASON_STOP,
    EndReason.LENGTH: engine_pb2.END_REASON_LENGTH,
    EndReason.ABORTED: engine_pb2.END_REASON_ABORTED,
    EndReason.ERROR: engine_pb2.END_REASON_ERROR,
}
_TASKS = {
    engine_pb2.TASK_GENERATE: Task.GENERATE,
    engine_pb2.TASK_EMBED: Task.EMBED,
    engine_pb2.TASK_SCORE: Task.SCORE,
}


def to_options(options: engine_pb2.DeploymentOptions) -> EngineOptions:
    """How the deployment runs, as the engine takes it."""
    return EngineOptions(
        backend=options.backend,
        dtype=options.dtype,
        deterministic=options.deterministic,
        kv_blocks=options.kv_blocks,
        block_size=options.block_size,
        max_step_tokens=options.max_step_tokens,
        max_running=options.max_running,
        max_context_tokens=options.max_context_tokens,
        threads=options.threads,
        kv_dtype=options.kv_dtype,
        device=options.device,
    )


def answer_seed(seed: int, index: int) -> int:
    """The seed of one of several answers: the one given for the first, else drawn out of both numbers.

    The first eight bytes of SHA-256 over the seed in eight bytes and the index in four, all big-endian. So any
    answer can be had again alone, by its own seed.
    """
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(seed.to_bytes(8, "big") + index.to_bytes(4, "big")).digest()[:8], "big")


def count_answers(submit: engine_pb2.Submit) -> int:
    """How many answers a Submit asks for; as many as there may be, when it asks for more."""
    return min(max(1, submit.n), MAX_ANSWERS)


def to_requests(handles: Sequence[int], submit: engine_pb2.Submit) -> list[Request]:
    """The engine's requests, one for each answer, under the engine-wide `handles`.

    All but the first follow the first, which alone reports on the prompt.

    Raises:
        EngineError: INVALID_REQUEST, EMPTY_PROMPT, INVALID_SAMPLING, INVALID_STOP, INVALID_TYPE_IDS.
    """
    if not submit.scope:
        raise EngineError("INVALID_REQUEST", "a request needs a scope")
    if submit.task != engine_pb2.TASK_GENERATE:
        return [_without_answer(handles, submit)]
    if submit.n > MAX_ANSWERS or len(submit.logit_bias) > MAX_BIASES:
        raise EngineError("INVALID_REQUEST", f"at most {MAX_ANSWERS} answers and {MAX_BIASES} biases are possible")
    prompt, stop = tuple(submit.token_ids), _to_stop(submit)
    requests = []
    for index, handle in enumerate(handles):
        judges_prompt = index == 0 and submit.HasField("prompt_logprobs")
        requests.append(
            Request(
                handle=handle,
                prompt=prompt,
                sampling=_to_sampling(submit, answer_seed(submit.seed, index)),
                stop=stop,
                scope=submit.scope,
                salt=submit.salt,
                weight=submit.weight,
                logprobs=submit.logprobs if submit.HasField("logprobs") else None,
                prompt_logprobs=submit.prompt_logprobs if judges_prompt else None,
                follows=handles[0] if index else None,
            )
        )
    return requests


def _without_answer(handles: Sequence[int], submit: engine_pb2.Submit) -> Request:
    """A request for a vector or a score, of which there is one."""
    if submit.task not in _TASKS or len(handles) != 1:
        raise EngineError("INVALID_REQUEST", "a vector or a score is asked for once, by a known task")
    return Request(
        handle=handles[0],
        prompt=tuple(submit.token_ids),
        sampling=SamplingParams(),
        stop=StopCriteria(1),
        scope=submit.scope,
        salt=submit.salt,
        weight=submit.weight,
        task=_TASKS[submit.task],
        type_ids=tuple(submit.type_ids),
    )


def _to_sampling(submit: engine_pb2.Submit, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=submit.temperature,
        top_k=submit.top_k,
        top_p=submit.top_p,
        seed=seed,
        min_p=submit.min_p,
        repetition_penalty=submit.repetition_penalty or 1.0,
        presence_penalty=submit.presence_penalty,
        frequency_penalty=submit.frequency_penalty,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in submit.logit_bias),
    )


def _to_stop(submit: engine_pb2.Submit) -> StopCriteria:
    return StopCriteria(
        max_tokens=submit.max_tokens,
        strings=tuple(submit.stop),
        token_ids=frozenset(submit.stop_token_ids),
        include_stop=submit.include_stop,
        ignore_eos=submit.ignore_eos,
        min_tokens=submit.min_tokens,
    )


def failed_row(handle: int, error: EngineError) -> StepRow:
    """The only row of a request that the engine never took."""
    return StepRow(handle, (), "", End(EndReason.ERROR, error_code=error.code, error_message=error.message))


def to_row(handle: int, index: int, row: StepRow) -> engine_pb2.Row:
    """What a step brought one answer, under the session's `handle`."""
    message = engine_pb2.Row(
        handle=handle,
        index=index,
        token_ids=row.token_ids,
        text=row.text,
        logprobs=_to_logprobs(row.logprobs),
        prompt_logprobs=_to_logprobs(row.prompt_logprobs),
        values=row.values,
    )
    if row.end is not None:
        message.end.CopyFrom(_to_end(row.end))
    return message


def _to_logprobs(found: Iterable[TokenLogprob]) -> list[engine_pb2.TokenLogprob]:
    return [
        engine_pb2.TokenLogprob(
            token_id=one.token_id,
            logprob=one.logprob,
            rank=one.rank,
            top=[engine_pb2.TopLogprob(token_id=token, logprob=logprob) for token, logprob in one.top],
        )
        for one in found
    ]


def _to_end(end: End) -> engine_pb2.End:
    return engine_pb2.End(
        reason=_REASONS[end.reason],
        stop_string=end.stop_string,
        stop_token_id=end.stop_token_id,
        error_reason=end.error_code,
        error_message=end.error_message,
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.completion_tokens,
        queue_ns=end.queue_ns,
        prefill_ns=end.prefill_ns,
        decode_ns=end.decode_ns,
        cached_prompt_tokens=end.cached_prompt_tokens,
        recomputed_tokens=end.recomputed_tokens,
        preemptions=end.preemptions,
    )
