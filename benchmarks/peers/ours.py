"""Our engine as a contender: a shape with drawn weights, through the real loop.

Run by a comparison: python -m benchmarks.peers.ours SHAPE WEIGHTS HEAD BACKEND THREADS
"""

import sys
from collections.abc import Mapping

from benchmarks.peers.protocol import Asked, ProcessContender, answer
from engine.bench.measures import Bench, Decode, Prefill
from engine.bench.report import ceiling
from engine.bench.subject import Load, engine_options, of_shape
from kernels.bench.ceilings import ReadProbe, products
from kernels.bench.clock import kernel_clock

_LOAD = Load(batch=32, context=4096 + 160, tokens=32 * 160 + 4096)


def contender(shape: str, weights: str, *, quantised_head: bool, backend: str, threads: int) -> ProcessContender:
    """Our engine, in a process of its own."""
    words = (shape, weights, "quantised" if quantised_head else "plain", backend, str(threads))
    command = (sys.executable, "-P", "-m", "benchmarks.peers.ours", *words)
    return ProcessContender(f"cloister {weights}", command, {"PYTHONPATH": "."})


def main(shape: str, weights: str, head: str, backend: str, threads: str) -> None:
    """Be asked."""
    options = engine_options(_LOAD, backend, "bfloat16", int(threads))
    subject = of_shape(shape, weights, options, quantised_head=head == "quantised")
    probe = ReadProbe()
    bench = Bench(subject.loop, subject.vocabulary, kernel_clock(subject.backend))

    def measure(asked: Asked) -> Mapping[str, float]:
        prefill = asked.kind == "prefill"
        what = Prefill(asked.tokens) if prefill else Decode(asked.batch, asked.tokens, asked.context)
        memory = probe.rate()
        timed = what.run(bench)
        memory = max(memory, probe.rate())
        operations = products().of("bfloat16", quantised=subject.quantised)
        most = ceiling(subject, what, memory, operations) or 0.0
        return {"rate": timed.rate, "outside": timed.outside, "memory": memory, "share": timed.rate / most}

    Prefill(64).run(bench)
    answer(measure)


if __name__ == "__main__":
    main(*sys.argv[1:])
