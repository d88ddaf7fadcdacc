"""The options of a deployment on the command line, and a memory plan for people: what `model` and `gpu` share."""

import argparse

from appliance.cli.arguments import positive
from appliance.cli.output import size
from appliance.protos import admin_pb2

_SIZES = {
    "kv_blocks": "pages of the KV cache",
    "block_size": "tokens per KV page",
    "max_step_tokens": "most tokens in one step",
    "max_running": "most requests in one step",
    "max_context_tokens": "prompt and answer together",
    "threads": "threads of the worker",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """A flag for each option of a deployment."""
    parser.add_argument(
        "--device", default="", metavar="ID", help="where it runs, as `gpu list` names it; the CPU when absent"
    )
    parser.add_argument(
        "--backend",
        default="",
        metavar="NAME",
        help="cpu, native, torch or reference; triton on a CUDA device, where it is the default",
    )
    parser.add_argument("--dtype", default="", choices=("", "float32", "bfloat16"), metavar="float32|bfloat16")
    parser.add_argument(
        "--kv-dtype",
        default="",
        choices=("", "float32", "bfloat16", "int8", "float8"),
        metavar="float32|bfloat16|int8|float8",
        help="of keys and values; as --dtype when absent; float8 on CUDA devices alone",
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="same output bit for bit, whatever shares the batch; slower"
    )
    for name, purpose in _SIZES.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=positive, default=0, metavar="N", help=purpose)


def options(args: argparse.Namespace) -> admin_pb2.DeploymentOptions:
    """The options that were given."""
    return admin_pb2.DeploymentOptions(
        backend=args.backend,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        deterministic=args.deterministic,
        device=args.device,
        **{name: getattr(args, name) for name in _SIZES},
    )


def plan_line(plan: admin_pb2.MemoryPlan) -> str:
    """A plan in one line."""
    line = f"{size(plan.total_bytes)} of {size(plan.available_bytes)} available on {plan.device}"
    return f"{line}, recorded from {plan.recorded_from}" if plan.recorded_from else line
