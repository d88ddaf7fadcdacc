"""The engine's last word on a request, in the words of the public API."""

from google.protobuf.duration_pb2 import Duration

from appliance.protos import inference_pb2 as api
from engine.protos import engine_pb2 as engine


def finish_name(end: engine.End) -> str:
    """stop or length, as the audit log has it."""
    return "stop" if end.reason == engine.END_REASON_STOP else "length"


def finished(end: engine.End) -> api.Finished:
    """Why the generation ended, and what matched."""
    if end.reason != engine.END_REASON_STOP:
        return api.Finished(reason=api.FINISH_REASON_LENGTH)
    if end.stop_string:
        return api.Finished(reason=api.FINISH_REASON_STOP, stop_string=end.stop_string)
    if end.HasField("stop_token_id"):
        return api.Finished(reason=api.FINISH_REASON_STOP, stop_token_id=end.stop_token_id)
    return api.Finished(reason=api.FINISH_REASON_STOP)


def completed(end: engine.End, prompt_tokens: int) -> api.Completed:
    """The bill and the times."""
    return api.Completed(
        usage=api.Usage(prompt_tokens=prompt_tokens, completion_tokens=end.completion_tokens),
        timings=api.Timings(
            queue=_duration(end.queue_ns),
            prefill=_duration(end.prefill_ns),
            decode=_duration(end.decode_ns),
            time_to_first_token=_duration(end.queue_ns + end.prefill_ns),
        ),
    )


def _duration(nanoseconds: int) -> Duration:
    return Duration(seconds=nanoseconds // 1_000_000_000, nanos=nanoseconds % 1_000_000_000)
