"""`cloister bench serve`: what applications see of a running appliance as more and more of them ask.

Requests arrive at random moments whatever has become of the earlier ones (an open loop, Poisson), and their times
count from the moment they were due: an appliance that falls behind cannot slow down who asks it.

Source: the measures of vLLM's and SGLang's serving benchmarks: time to the first token, time between tokens, and
goodput (Zhong et al., "DistServe", OSDI 2024), the requests a second that meet both objectives.
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.cli import answering, arguments
from appliance.cli.failure import UsageError
from appliance.cli.output import emit

if TYPE_CHECKING:
    from appliance.client import AsyncClient

_TOKENS = range(32, 256)  # of which prompts are drawn: every vocabulary has them


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked.

    Attributes:
        model: an alias.
        requests: of each rate.
        prompt: tokens of each.
        answer: tokens of each.
        seed: of arrivals and prompts.
        timeout: seconds, of each request.
        first_s: objective of the first token.
        between_s: objective of the mean time between tokens.
    """

    model: str
    requests: int
    prompt: int
    answer: int
    seed: int
    timeout: float
    first_s: float
    between_s: float

    def arrivals(self, rate: float) -> Iterator[float]:
        """Seconds from the start at which requests are due; the same for the same seed and rate."""
        draw, moment = random.Random(f"{self.seed}/{rate}"), 0.0  # noqa: S311  # no secret
        for _ in range(self.requests):
            moment += draw.expovariate(rate)
            yield moment


@dataclass(slots=True)
class Seen:
    """One request as its application saw it, in seconds from the start.

    Attributes:
        due: when it was to be asked.
        moments: when each step's tokens came.
        tokens: how many there were.
        code: why it failed, else empty.
    """

    due: float
    moments: list[float] = field(default_factory=list)
    tokens: int = 0
    code: str = ""

    @property
    def first(self) -> float:
        """To its first token."""
        return self.moments[0] - self.due

    @property
    def gaps(self) -> list[float]:
        """Between what came and what came next."""
        return [after - before for before, after in zip(self.moments, self.moments[1:], strict=False)]

    def meets(self, plan: Plan) -> bool:
        """It was answered within both objectives."""
        if self.code or not self.moments:
            return False
        mean = (self.moments[-1] - self.moments[0]) / max(1, self.tokens - 1)
        return self.first <= plan.first_s and mean <= plan.between_s


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister bench serve`."""
    count = arguments.positive
    parser.add_argument("model", metavar="MODEL", help="an alias that the tenant may call")
    answering.add_connection_arguments(parser)
    parser.add_argument("--rate", type=_rates, default=[1.0, 2.0, 4.0], metavar="X,...", help="requests a second")
    parser.add_argument("--requests", type=count, default=64, metavar="N", help="of each rate (default 64)")
    parser.add_argument("--prompt", type=count, default=128, metavar="N", help="tokens of each (default 128)")
    parser.add_argument("--answer", type=count, default=64, metavar="N", help="tokens of each (default 64)")
    parser.add_argument("--seed", type=arguments.whole(0, 2**31), default=0, metavar="N", help="default 0")
    parser.add_argument("--first-ms", type=count, default=1000, metavar="N", help="objective (default 1000)")
    parser.add_argument("--between-ms", type=count, default=100, metavar="N", help="objective (default 100)")
    parser.set_defaults(run=_serve)


def _rates(text: str) -> list[float]:
    rates = [arguments.real(word) for word in arguments.names(text)]
    if not rates or not all(0 < rate <= 10_000 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a list of numbers above 0, with commas")
    return rates


def _serve(args: argparse.Namespace) -> int:
    directory = args.credentials or os.environ.get("CLOISTER_CREDENTIALS")
    if not directory:
        raise UsageError("name the credentials: --credentials DIR, as `cloister key issue --out DIR` made them")
    plan = Plan(
        model=args.model, requests=args.requests, prompt=args.prompt, answer=args.answer, seed=args.seed,
        timeout=args.timeout or 120.0, first_s=args.first_ms / 1e3, between_s=args.between_ms / 1e3,
    )  # fmt: skip
    rows = asyncio.run(_measure(Path(directory), args.address, plan, args.rate))
    emit(args, rows, _page(plan, rows))
    return 0 if all(row["answered"] for row in rows) else 1


async def _measure(
    directory: Path, address: str | None, plan: Plan, rates: Sequence[float]
) -> list[dict[str, Any]]:
    from appliance.client import AsyncClient

    async with AsyncClient.from_dir(directory, address) as client:
        await client.list_models()  # the connection is there before anything is timed
        return [summary(plan, rate, await _at_rate(client, plan, rate)) for rate in rates]


async def _at_rate(client: "AsyncClient", plan: Plan, rate: float) -> list[Seen]:
    """Ask when each request is due, and wait for all of them."""
    began = time.monotonic()
    asked = []
    for number, due in enumerate(plan.arrivals(rate)):
        await asyncio.sleep(max(0.0, began + due - time.monotonic()))
        asked.append(asyncio.create_task(_ask(client, plan, f"{rate}/{number}", began, due)))
    return list(await asyncio.gather(*asked))


async def _ask(client: "AsyncClient", plan: Plan, name: str, began: float, due: float) -> Seen:
    """One request; a prompt that no other has, so that no cache answers it."""
    from appliance.errors import CloisterError

    draw = random.Random(f"{plan.seed}/{name}")  # noqa: S311  # no secret
    prompt = [draw.choice(_TOKENS) for _ in range(plan.prompt)]
    seen = Seen(due)
    stream = client.generate(
        plan.model, token_ids=prompt, temperature=0, max_tokens=plan.answer, ignore_eos=True,
        return_token_ids=True, timeout=plan.timeout, retry=False,
    )  # fmt: skip
    try:
        async for delta in stream.deltas():
            if delta.token_ids:
                seen.moments.append(time.monotonic() - began)
                seen.tokens += len(delta.token_ids)
    except CloisterError as error:
        seen.code = error.code
    return seen


def summary(plan: Plan, rate: float, seen: Sequence[Seen]) -> dict[str, Any]:
    """What all requests of one rate came to; times in milliseconds, None where nothing was answered."""
    answered = [each for each in seen if not each.code and each.moments]
    span = max((each.moments[-1] for each in answered), default=0.0)
    firsts = sorted(each.first for each in answered)
    gaps = sorted(gap for each in answered for gap in each.gaps)
    return {
        "rate": rate,
        "requests": len(seen),
        "answered": len(answered),
        "failed": dict(Counter(each.code or "NO_TOKENS" for each in seen if each not in answered)),
        "requests_per_second": len(answered) / span if span else 0.0,
        "tokens_per_second": sum(each.tokens for each in answered) / span if span else 0.0,
        "first_ms": {f"p{share}": _quantile(firsts, share) for share in (50, 90, 99)},
        "between_ms": {f"p{share}": _quantile(gaps, share) for share in (50, 90, 99)},
        "goodput": sum(each.meets(plan) for each in seen) / span if span else 0.0,
    }


def _quantile(ordered: Sequence[float], percent: int) -> float | None:
    """The least number that so many percent do not exceed, in milliseconds."""
    return ordered[-(-len(ordered) * percent // 100) - 1] * 1e3 if ordered else None


def _page(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    what = f"{plan.requests} requests of each rate, {plan.prompt} + {plan.answer} tokens, seed {plan.seed}"
    within = f"first token within {plan.first_s * 1e3:.0f} ms, then one every {plan.between_s * 1e3:.0f} ms"
    spread = f"{'p90':>8} {'p99':>8}"
    names = f"{'rate/s':>8} {'answered':>9} {'failed':>7} {'tokens/s':>9} {'first p50':>10} {spread}"
    lines = [
        f"{plan.model}: {what}; objectives: {within}",
        f"{names} {'between p50':>12} {spread} {'goodput/s':>10}",
    ]
    for row in rows:
        firsts, between = (
            [f"{value:,.1f}" if value is not None else "-" for value in row[name].values()]
            for name in ("first_ms", "between_ms")
        )
        lines.append(
            f"{row['rate']:>8g} {row['answered']:>9} {sum(row['failed'].values()):>7} "
            f"{row['tokens_per_second']:>9,.0f} {firsts[0]:>10} {firsts[1]:>8} {firsts[2]:>8} "
            f"{between[0]:>12} {between[1]:>8} {between[2]:>8} {row['goodput']:>10.2f}"
        )
    return "\n".join([*lines, json.dumps(rows)])
