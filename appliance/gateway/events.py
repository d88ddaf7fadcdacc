"""What the engine says of a request, in the words of the public API."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from google.protobuf.duration_pb2 import Duration

from appliance.protos import inference_pb2 as api
from engine.protos import engine_pb2 as engine

MAX_PROMPT_LOGPROBS = 256
"""Prompt tokens told of in one message; with 20 likeliest tokens each that is 64 KiB."""


def answer_delta(row: engine.Row, with_ids: bool) -> api.Delta:
    """What one step brought one answer."""
    delta = api.Delta(index=row.index, text=row.text, token_ids=row.token_ids if with_ids else ())
    if row.logprobs:
        delta.logprobs.extend(map(_logprob, row.logprobs))
    return delta


def prompt_deltas(row: engine.Row) -> Iterator[api.Delta]:
    """What the model thought of the prompt, in messages of bounded size."""
    for start in range(0, len(row.prompt_logprobs), MAX_PROMPT_LOGPROBS):
        part = row.prompt_logprobs[start : start + MAX_PROMPT_LOGPROBS]
        yield api.Delta(prompt_logprobs=map(_logprob, part))


def finish_name(ends: Iterable[engine.End]) -> str:
    """stop or length, as the audit log has it: stop when nothing was cut short."""
    return "stop" if all(end.reason == engine.END_REASON_STOP for end in ends) else "length"


def finished(index: int, end: engine.End) -> api.Finished:
    """Why an answer ended, and what matched."""
    if end.reason != engine.END_REASON_STOP:
        return api.Finished(index=index, reason=api.FINISH_REASON_LENGTH)
    if end.stop_string:
        return api.Finished(index=index, reason=api.FINISH_REASON_STOP, stop_string=end.stop_string)
    if end.HasField("stop_token_id"):
        return api.Finished(index=index, reason=api.FINISH_REASON_STOP, stop_token_id=end.stop_token_id)
    return api.Finished(index=index, reason=api.FINISH_REASON_STOP)


def completed(ends: Mapping[int, engine.End], prompt_tokens: int) -> api.Completed:
    """The bill of all answers, and the times of the first; its first token is the first of any."""
    first = ends[0]
    return api.Completed(
        usage=api.Usage(
            prompt_tokens=prompt_tokens,
            cached_prompt_tokens=first.cached_prompt_tokens,
            completion_tokens=sum(end.completion_tokens for end in ends.values()),
            recomputed_tokens=sum(end.recomputed_tokens for end in ends.values()),
        ),
        timings=api.Timings(
            queue=_duration(first.queue_ns),
            prefill=_duration(first.prefill_ns),
            decode=_duration(first.decode_ns),
            time_to_first_token=_duration(min(end.queue_ns + end.prefill_ns for end in ends.values())),
            preemptions=first.preemptions,
        ),
    )


def batch_usage(ends: Sequence[engine.End], prompt_tokens: int) -> api.Usage:
    """The bill of a request of many inputs; nothing was generated."""
    return api.Usage(
        prompt_tokens=prompt_tokens,
        cached_prompt_tokens=sum(end.cached_prompt_tokens for end in ends),
        recomputed_tokens=sum(end.recomputed_tokens for end in ends),
    )


def batch_timings(ends: Sequence[engine.End]) -> api.BatchTimings:
    """From the first input that was begun to the last that was done."""
    queue = min(end.queue_ns for end in ends)
    done = max(end.queue_ns + end.prefill_ns + end.decode_ns for end in ends)
    return api.BatchTimings(queue=_duration(queue), compute=_duration(done - queue))


def _logprob(of: engine.TokenLogprob) -> api.TokenLogprob:
    """One token as the public API has it, field by field the same."""
    top = [api.TopLogprob(token_id=one.token_id, logprob=one.logprob) for one in of.top]
    return api.TokenLogprob(token_id=of.token_id, logprob=of.logprob, rank=of.rank, top=top)


def _duration(nanoseconds: int) -> Duration:
    return Duration(seconds=nanoseconds // 1_000_000_000, nanos=nanoseconds % 1_000_000_000)
