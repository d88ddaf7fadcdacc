"""How fast the demo's appliance answers, seen from a client: one stream alone, then many at once."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.client import AsyncClient
from benchmarks.demo_models.notes import Note

TOKENS = 64
"""Tokens of each measured answer."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What a client saw: streams at once, tokens they brought together, seconds from first call to last token."""

    streams: int
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second of all streams together."""
        return self.tokens / self.seconds


async def measure(credentials: Path, alias: str, notes: Sequence[Note]) -> Speed:
    """Answer all `notes` at once; the connection is made before the clock starts."""
    async with AsyncClient.from_dir(credentials) as client:
        await client.list_models()
        streams = [
            client.chat(alias, note.messages, temperature=0, max_tokens=TOKENS, ignore_eos=True) for note in notes
        ]
        began = time.monotonic()
        answers = await asyncio.gather(*(stream.result() for stream in streams))
        seconds = time.monotonic() - began
    return Speed(len(notes), sum(answer.completed.usage.completion_tokens for answer in answers), seconds)
