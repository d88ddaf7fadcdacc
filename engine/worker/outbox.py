"""What a session has not yet read: at most one frame, into which later steps are merged, of bounded size."""

import asyncio
from collections.abc import Iterable

from engine.protos import engine_pb2

MAX_PENDING_TOKENS = 65_536
"""Tokens a session may leave unread before its requests are aborted; eight log probabilities count as one."""

_LOGPROBS_PER_TOKEN = 8  # about as many bytes as a token with its text in Python's keeping


class Outbox:
    """One session's unread rows, merged by answer.

    Args:
        max_tokens: unread tokens beyond which `push` reports an overflow.
    """

    def __init__(self, max_tokens: int = MAX_PENDING_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._step = 0
        self._rows: dict[tuple[int, int], engine_pb2.Row] = {}
        self._tokens = 0
        self._closed = False
        self._something = asyncio.Event()

    def push(self, step: int, rows: Iterable[engine_pb2.Row]) -> bool:
        """Add what `step` brought; False when the session has left too much unread."""
        self._step = step
        for row in rows:
            self._tokens += _weight(row)
            waiting = self._rows.setdefault((row.handle, row.index), row)
            if waiting is not row:
                waiting.token_ids.extend(row.token_ids)
                waiting.logprobs.extend(row.logprobs)
                waiting.prompt_logprobs.extend(row.prompt_logprobs)
                waiting.text += row.text
                if row.HasField("end"):
                    waiting.end.CopyFrom(row.end)
        self._something.set()
        return self._tokens <= self._max_tokens

    def close(self) -> None:
        """Let `take` return None once everything is read."""
        self._closed = True
        self._something.set()

    async def take(self) -> engine_pb2.SessionResponse | None:
        """All that is unread as one frame, waiting for it; None at the end."""
        while not self._rows:
            if self._closed:
                return None
            self._something.clear()
            await self._something.wait()
        frame = engine_pb2.SessionResponse(step=self._step, rows=self._rows.values())
        self._rows, self._tokens = {}, 0
        return frame


def _weight(row: engine_pb2.Row) -> int:
    """What a row counts: its tokens, and its log probabilities."""
    logprobs = sum(1 + len(one.top) for judged in (row.logprobs, row.prompt_logprobs) for one in judged)
    return len(row.token_ids) + -(-logprobs // _LOGPROBS_PER_TOKEN)
