"""`cloister gpu`: the devices, the CPU among them, and what a model would take of one before it is loaded."""

import argparse

from appliance.cli.deployment_options import add_options, options
from appliance.cli.failure import REFUSED, Failure
from appliance.cli.output import emit, emit_error, plain, printable, size, table
from appliance.client.admin import AdminClient
from appliance.protos import admin_pb2


def register(parser: argparse.ArgumentParser) -> None:
    """The verbs of `cloister gpu`."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    listing = verbs.add_parser("list", help="the devices, and what a new deployment could take of them")
    listing.set_defaults(run=_list)
    plan = verbs.add_parser(
        "plan",
        help="memory that a model would take, part by part; exit 3 when it does not fit",
        description="Memory that a model version would take, computed from its files without loading it. "
        "Exit status 3 when it does not fit.",
    )
    plan.add_argument("version", metavar="MODEL", help="name@version, a name for its newest version, or a digest")
    add_options(plan)
    plan.set_defaults(run=_plan)


def _list(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        found = admin.devices.ListDevices(admin_pb2.ListDevicesRequest())
    emit(args, plain(found), _shown(found))
    return 0


def _shown(found: admin_pb2.ListDevicesResponse) -> str:
    """A block for each device: UUIDs and names leave no room for a table in 80 columns."""
    blocks = ["\n".join(_device(device)) for device in found.devices]
    if found.nvml:
        blocks.append(f"NVIDIA: {printable(found.nvml)}")
    if found.recorded_from:
        blocks.append(f"recorded from {printable(found.recorded_from)}: not this machine's devices")
    return "\n\n".join(blocks)


def _device(device: admin_pb2.Device) -> list[str]:
    told = f"{size(device.memory_available_bytes)} available of {size(device.memory_bytes)}"
    memory = told if device.memory_bytes else "not told to this user; its slices have it"
    facts = {
        "name": device.name,
        "memory": memory,
        "cores": str(device.cores) if device.cores else "",
        "slice of": device.slice_of,
        "compute": device.compute_capability,
        "driver": device.driver,
        "state": _state(device),
        "runs": ", ".join(device.deployments),
    }
    lines = [f"  {name:<9} {printable(fact)}" for name, fact in facts.items() if fact]
    return [printable(device.id), *lines]


def _state(device: admin_pb2.Device) -> str:
    told = []
    if device.HasField("temperature_c"):
        told.append(f"{device.temperature_c} °C")
    if device.HasField("utilisation_percent"):
        told.append(f"{device.utilisation_percent} % busy")
    return ", ".join(told)


def _plan(args: argparse.Namespace) -> int:
    request = admin_pb2.PlanModelRequest(model_version=args.version, options=options(args))
    with AdminClient(args.home) as admin:
        answer = admin.devices.PlanModel(request)
    plan = answer.plan
    emit(args, plain(answer), _plan_shown(answer))
    if plan.fits:
        return 0
    numbers = {"total_bytes": str(plan.total_bytes), "available_bytes": str(plan.available_bytes)}
    emit_error(args.json, Failure("OUT_OF_MEMORY", f"{plan.summary}; {plan.advice}", REFUSED, numbers))
    return REFUSED


def _plan_shown(answer: admin_pb2.PlanModelResponse) -> str:
    plan, chosen = answer.plan, answer.plan.options
    mode = " deterministic" if chosen.deterministic else ""
    pages = f"{chosen.kv_blocks:,} pages of {chosen.block_size} tokens"
    parts = (
        ("weights", plan.weights_bytes, f"{plan.parameters:,} parameters, {chosen.dtype}"),
        ("KV cache", plan.kv_bytes, pages),
        ("activations", plan.activation_bytes, f"at most, {chosen.max_running} requests a step"),
        ("loading", plan.loading_bytes, "at most, beyond the rest"),
        (
            "process",
            plan.process_bytes,
            "CUDA and graphs" if plan.host_total_bytes else "interpreter and libraries",
        ),
        ("total", plan.total_bytes, "at the highest point"),
        ("available", plan.available_bytes, "on the device" if plan.host_total_bytes else f"on {plan.device}"),
        *_of_host(plan),
    )
    rows = [(name, f"{count:,}", size(count), what) for name, count, what in parts]
    kv = f", {chosen.kv_dtype} KV" if chosen.kv_dtype not in ("", chosen.dtype) else ""
    runs = f"{chosen.backend} {chosen.dtype}{mode}{kv}, context {chosen.max_context_tokens:,}"
    lines = [
        f"{printable(answer.model_version)}  {runs}",
        table(("part", "bytes", "", "of"), rows),
        ("fits" if plan.fits else "DOES NOT FIT") + f"; the KV cache holds {plan.full_contexts:,} full contexts",
    ]
    if plan.host_total_bytes:
        lines.append(f"on {printable(plan.device)}")
    if plan.recorded_from:
        lines.append(f"against devices recorded from {printable(plan.recorded_from)}")
    return "\n".join(lines)


def _of_host(plan: admin_pb2.MemoryPlan) -> tuple[tuple[str, int, str], ...]:
    """What the host gives beside, where the device has memory of its own."""
    if not plan.host_total_bytes:
        return ()
    return (
        ("of the host", plan.host_total_bytes, "libraries, and files while they load"),
        ("available", plan.host_available_bytes, "on the host"),
    )
