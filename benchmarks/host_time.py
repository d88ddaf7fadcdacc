"""What scheduler, KV pool and loop take of a step on the host, beside a runner that returns at once.

Run: python -m benchmarks.host_time [--rounds 5]

Batches of requests with prompts of 32 tokens and answers of 200 on the tokens of demo-notes-s, with a prefix cache
and without. Printed is the process's CPU time per step, the least of the rounds: other programs only add to it.
"""

import argparse
import hashlib
import os
import time
from pathlib import Path

from engine.build import build_engine
from engine.loop import EngineLoop
from engine.options import EngineOptions
from engine.plan import ResultRow, StepPlan, StepResult
from engine.request import Request, SamplingParams, StopCriteria
from engine.weights.files import File, FileSet

MODEL = Path(__file__).parents[1] / "demo" / "demo-notes-s"
BATCHES, PROMPT, ANSWER = (1, 16, 64), 32, 200


class Instant:
    """A runner that draws a token for each row that ends with a sample, and computes nothing."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Tokens by position, so that answers differ in nothing but their prompt."""
        drawn = ((row.handle, (40 + row.end % 30,) if row.sampling_slot is not None else ()) for row in plan.rows)
        return StepResult(plan.step, tuple(ResultRow(handle, token_ids) for handle, token_ids in drawn))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for batch in BATCHES:
        loop = build(batch)
        without, cached = (
            min(microseconds_per_step(loop, batch, salt, number) for number in range(rounds))
            for salt in (b"", b"salt")
        )
        print(f"{batch:3} requests: {without:6.1f} us per step, {cached:6.1f} us with a prefix cache", flush=True)


def build(batch: int) -> EngineLoop:
    """An engine for `batch` requests at once, without its runner."""
    paths = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in MODEL.iterdir() if path.is_file()}
    files = tuple(File(path.name, path.stat().st_size, digest) for digest, path in paths.items())
    options = EngineOptions(
        backend="cpu",
        dtype="float32",
        kv_blocks=4096,
        block_size=16,
        max_running=batch,
        max_step_tokens=4096,
        threads=1,
    )
    loop = build_engine(FileSet("0" * 64, files), lambda digest: os.open(paths[digest], os.O_RDONLY), options)
    loop._runner = Instant()
    return loop


def microseconds_per_step(loop: EngineLoop, batch: int, salt: bytes, number: int) -> float:
    """CPU time of this process; round `number` asks for what no other has asked for."""
    for handle in range(batch):
        prompt = [30 + (number * batch + handle) * (i + 7) % 200 for i in range(PROMPT)]
        stop = StopCriteria(ANSWER, ignore_eos=True)
        loop.submit(Request(handle, prompt, SamplingParams(), stop, "scope", salt))
    steps, start = loop.status().steps, time.process_time()
    while loop.has_work:
        loop.step()
    return (time.process_time() - start) / (loop.status().steps - steps) * 1e6


if __name__ == "__main__":
    main()
