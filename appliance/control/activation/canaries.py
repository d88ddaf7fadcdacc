"""Canaries: conversations of a release whose answers show that the version works here as it was released."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import grpc

from appliance.client.aio import AsyncClient
from appliance.control.activation.predicates import holds
from appliance.errors import CloisterError
from bundles.protos import importer_pb2

MISMATCH = "MISMATCH"
TIMEOUT = "DEADLINE_EXCEEDED"


@dataclass(frozen=True)
class Verdict:
    """What came of the canaries so far.

    Attributes:
        total: how many there are.
        failures: code by index from 0, in order; MISMATCH, DEADLINE_EXCEEDED, or what the appliance refused with.
        done: how many were tried.
    """

    total: int
    done: int = 0
    failures: tuple[tuple[int, str], ...] = ()

    @property
    def passed(self) -> int:
        """How many answered as they should."""
        return self.done - len(self.failures)

    def after(self, code: str) -> "Verdict":
        """The verdict after one more; an empty code is a pass."""
        failures = (*self.failures, (self.done, code)) if code else self.failures
        return Verdict(self.total, self.done + 1, failures)

    def check(self, pass_percent: int) -> None:
        """Refuse what passed too seldom.

        Raises:
            CloisterError: CANARY_TIMEOUT where all that failed took too long, else CANARY_FAILED.
        """
        if self.passed * 100 >= pass_percent * self.total:
            return
        told = ", ".join(f"{index} {code}" for index, code in self.failures)
        late = all(code == TIMEOUT for _, code in self.failures)
        raise CloisterError(
            "CANARY_TIMEOUT" if late else "CANARY_FAILED",
            f"{self.passed} of {self.total} canaries passed and {pass_percent} % must; failed, by index: {told}",
            grpc.StatusCode.FAILED_PRECONDITION,
        )


async def run(
    client: AsyncClient, model: str, canaries: Sequence[importer_pb2.Canary], limit_s: float
) -> AsyncGenerator[Verdict, None]:
    """Ask one canary after the other, each greedily and with a limit of its own; the verdict after each.

    Args:
        client: of the tenant that may call `model`.
        model: the alias of the version under trial.
        canaries: of the release.
        limit_s: seconds that an answer may take.
    """
    verdict = Verdict(len(canaries))
    for canary in canaries:
        verdict = verdict.after(await _failure(client, model, canary, limit_s))
        yield verdict


async def _failure(client: AsyncClient, model: str, canary: importer_pb2.Canary, limit_s: float) -> str:
    """The code of what was wrong with an answer; empty for nothing. No text of it goes anywhere."""
    messages = [{"role": message.role, "content": message.content} for message in canary.messages]
    try:
        async with (
            asyncio.timeout(limit_s),
            client.chat(model, messages, temperature=0, max_tokens=canary.max_tokens, timeout=limit_s) as stream,
        ):
            answer = (await stream.result()).text
    except TimeoutError:
        return TIMEOUT
    except CloisterError as error:
        return error.code
    return "" if holds(canary.match, canary.expected, answer) else MISMATCH
