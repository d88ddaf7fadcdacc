"""Tokens per second of the whole appliance against transformers' own `generate`, on the same model and machine.

Run: python -m benchmarks.serving [--model demo-notes-s] [--dtype bfloat16] [--streams 16] [--rounds 5]
     python -m benchmarks.serving --shape llama-3.2-1b --weights int4-g32 --rounds 2 --peer-streams 2

Ours: a fresh appliance, signed bundle and all; N streams at once through mutual TLS, admission, ledger and
audit log. The peer: a loop of `model.generate`, one request after another as a program without a serving engine
has them, in this process, on all cores, with no network, no bill and no record. Both greedy, of equal length, over
notes that no round has seen, so that no prefix cache helps. Rounds alternate; medians and their ratio are printed.
With --shape the model is one of a published shape with drawn weights, the peer's in bfloat16 whatever ours are
stored in; as it answers one request after another, some of them show its rate.
"""

import argparse
import asyncio
import os
import pwd
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo_models.notes import Note, draw
from benchmarks.shape_folder import shape_folder
from demo.machine import ROOT, Machine
from demo.speed import TOKENS, measure
from engine.bench.shapes import SHAPES
from engine.bench.weights import FORMATS

ALIAS, TENANT = "notes", "bench"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-notes-s", help="a folder in demo/")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="instead of a model")
    parser.add_argument("--weights", default="bf16", choices=sorted(FORMATS), help="ours, of a shape")
    parser.add_argument("--peer-streams", type=int, help="requests that the peer answers in a round (default all)")
    args = parser.parse_args()
    folder = shape_folder(args.shape, args.weights) if args.shape else ROOT / "demo" / args.model
    generate = peer(shape_folder(args.shape, "bf16") if args.shape else folder, args.dtype)
    machine = Machine(".bench")
    try:
        start(machine, folder, args.dtype, 2 * args.streams)
        compare(machine, generate, args.streams, args.rounds, args.peer_streams or args.streams)
    finally:
        machine.stop()
        machine.tidy()


def start(machine: Machine, source: Path, dtype: str, concurrent: int) -> None:
    """An appliance that serves the model in `source`, with credentials of one tenant."""
    folder, model = machine.folder, source.name
    keys, bundle = folder / "keys", folder / "model.bundle"
    root = ("--root", f"{keys / 'root.json'}")
    release = ("--release-key", f"{keys / 'release.key'}", "--publisher-key", f"{keys / 'publisher.key'}")
    named = ("--name", model, "--version", "1.0.0", "--sequence", "1", "--out", f"{bundle}")
    machine.run(("trust", "init", "--out", f"{keys}"))
    machine.run(("bundle", "build", "--model", f"{source}", *named))
    machine.run(("bundle", "sign", f"{bundle}", *release, *root))
    user = pwd.getpwuid(os.getuid()).pw_name
    machine.run(("init", "--operator", f"bench={user}", "--site", "bench", "--profile", "demo", *root))
    machine.serve(("serve", "--listen", "127.0.0.1:0"), keep=False)
    machine.run(("bundle", "import", f"{bundle}"))
    machine.run(("model", "load", model, "--as", ALIAS, "--dtype", dtype))
    machine.run(("alias", "set", ALIAS, ALIAS))
    machine.run(("tenant", "add", TENANT, "--models", ALIAS, "--max-concurrent", str(concurrent)))
    machine.run(("key", "issue", "--tenant", TENANT, "--app", "bench", "--out", f"{folder / 'credentials'}"))


def peer(folder: Path, dtype: str) -> Callable[[Sequence[Note]], float]:
    """A loop of `generate` over notes, which returns its tokens per second."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()

    def generate(notes: Sequence[Note]) -> float:
        prompts = [
            tokenizer.apply_chat_template(
                note.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            for note in notes
        ]
        began = time.monotonic()
        with torch.inference_mode():
            for prompt in prompts:
                network.generate(**prompt, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS)
        return len(notes) * TOKENS / (time.monotonic() - began)

    return generate


def compare(
    machine: Machine, generate: Callable[[Sequence[Note]], float], streams: int, rounds: int, peer_streams: int
) -> None:
    """Alternate, and print each round, the medians and their ratios."""
    credentials = machine.folder / "credentials"
    alone, together, theirs = [], [], []
    warm, *drawn = (draw(seed, streams) for seed in range(1000, 1001 + 2 * rounds))
    generate(warm[:1])
    asyncio.run(measure(credentials, ALIAS, warm))
    print(f"{'round':>8} {'1 stream':>12} {f'{streams} streams':>12} {'generate':>12}   tokens/s")
    for number, (ours, other) in enumerate(zip(drawn[::2], drawn[1::2], strict=True), 1):
        alone.append(asyncio.run(measure(credentials, ALIAS, other[:1])).rate)
        together.append(asyncio.run(measure(credentials, ALIAS, ours)).rate)
        theirs.append(generate(ours[:peer_streams]))
        print(f"{number:>8} {alone[-1]:>12,.0f} {together[-1]:>12,.0f} {theirs[-1]:>12,.0f}")
    one, many, loop = map(statistics.median, (alone, together, theirs))
    print(f"{'median':>8} {one:>12,.0f} {many:>12,.0f} {loop:>12,.0f}")
    print(f"{'ratio':>8} {one / loop:>11.2f}x {many / loop:>11.2f}x {1:>11.2f}x")


if __name__ == "__main__":
    main()
