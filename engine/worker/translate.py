"""Between the protocol's messages and the engine's own types."""

from engine.errors import EngineError
from engine.loop import StepRow
from engine.options import EngineOptions
from engine.protos import engine_pb2
from engine.request import End, EndReason, Request, SamplingParams, StopCriteria

_REASONS = {
    EndReason.STOP: engine_pb2.END_REASON_STOP,
    EndReason.LENGTH: engine_pb2.END_REASON_LENGTH,
    EndReason.ABORTED: engine_pb2.END_REASON_ABORTED,
    EndReason.ERROR: engine_pb2.END_REASON_ERROR,
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
    )


def to_request(handle: int, submit: engine_pb2.Submit) -> Request:
    """The engine's request under the engine-wide `handle`.

    Raises:
        EngineError: INVALID_REQUEST, EMPTY_PROMPT, INVALID_SAMPLING, INVALID_STOP.
    """
    if not submit.scope:
        raise EngineError("INVALID_REQUEST", "a request needs a scope")
    return Request(
        handle=handle,
        prompt=tuple(submit.token_ids),
        sampling=SamplingParams(submit.temperature, submit.top_k, submit.top_p, submit.seed),
        stop=StopCriteria(
            max_tokens=submit.max_tokens,
            strings=tuple(submit.stop),
            token_ids=frozenset(submit.stop_token_ids),
            include_stop=submit.include_stop,
            ignore_eos=submit.ignore_eos,
        ),
        scope=submit.scope,
        salt=submit.salt,
        weight=submit.weight,
    )


def failed_row(handle: int, error: EngineError) -> StepRow:
    """The only row of a request that the engine never took."""
    return StepRow(handle, (), "", End(EndReason.ERROR, error_code=error.code, error_message=error.message))


def to_row(handle: int, row: StepRow) -> engine_pb2.Row:
    """What a step brought, under the session's `handle`."""
    message = engine_pb2.Row(handle=handle, token_ids=row.token_ids, text=row.text)
    if row.end is not None:
        message.end.CopyFrom(_to_end(row.end))
    return message


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
    )
