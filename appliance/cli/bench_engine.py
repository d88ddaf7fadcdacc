"""`cloister bench engine`: tokens per second of the engine alone, in a process of its own."""

import argparse
import subprocess
import sys

from appliance.cli import arguments

_SEVERAL = {
    "weights": "of a shape: bf16, int8, int4-g32 or int4-g128 (default bf16)",
    "device": "cpu, or cuda: the first CUDA device (default cpu)",
    "backend": "as `cloister model load` takes it",
    "dtype": "the same (default bfloat16)",
    "kv-dtype": "of keys and values, the same (default as dtype)",
    "only": "of prefill, b1, b8, b32, b128, context and workload (default all), with commas",
}
_COUNTS = {
    "threads": "default: all cores that this process may use",
    "rounds": "of each measure, whose median is told (default 3)",
    "prompt": "tokens of prefill (default 512)",
    "steps": "of decoding that are timed (default 32)",
    "context": "tokens of the prompt before them, of context (default 4096)",
    "batch": "requests of context at once (default 1)",
    "requests": "of the workload (default 256)",
}


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister bench engine`."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--shape", metavar="NAME", help="of a published model, with drawn weights: llama-3.2-1b, ..."
    )
    what.add_argument("--folder", type=arguments.directory, metavar="DIR", help="a model's own weights")
    parser.add_argument("--quantised-head", action="store_true", help="of a shape: embeddings and head as weights")
    for name, text in _SEVERAL.items():
        parser.add_argument(f"--{name}", metavar="NAME" if name != "only" else "NAME,...", help=text)
    for name, text in _COUNTS.items():
        parser.add_argument(f"--{name}", type=arguments.positive, metavar="N", help=text)
    parser.add_argument("--scale", type=arguments.real, metavar="X", help="of the workload's lengths (default 1)")
    parser.set_defaults(run=_engine)


def _engine(args: argparse.Namespace) -> int:
    """Run it; with --json its last line alone."""
    names = ("shape", "folder", *_SEVERAL, *_COUNTS, "scale")
    words = [f"--{name}={value}" for name in names if (value := getattr(args, name.replace("-", "_"))) is not None]
    words += ["--quantised-head"] if args.quantised_head else []
    command = [sys.executable, "-P", "-m", "engine.bench", *words]
    sys.stdout.flush()
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE if args.json else None, text=True)
    if args.json and done.stdout:
        print(done.stdout.splitlines()[-1])
    return done.returncode
