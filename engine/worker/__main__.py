"""`python -m engine.worker`: one deployment's model, its KV pages and its steps."""

import asyncio
import contextlib
import logging
import os
import sys
from functools import partial
from pathlib import Path

import grpc

from engine.errors import EngineError, is_out_of_memory
from engine.launch import (
    DERIVED_REFUSED,
    STEP_WITHIN_VARIABLE,
    Launch,
    exit_refused,
    given_cores,
    keep_to,
    read_launch,
)
from engine.loop import EngineLoop
from engine.memory import available_bytes
from engine.options import EngineOptions
from engine.process import Process, configure_logging, run
from engine.protos import engine_pb2_grpc
from engine.worker.engine_thread import EngineThread
from engine.worker.service import WorkerService
from engine.worker.translate import to_options

NAME = "engine-worker"
FORBIDDEN = ("sqlalchemy", "cryptography", "jinja2")
_DRAIN_S = 10.0
_STREAMS_GRACE_S = 0.5
_MAX_REQUEST_BYTES = 16 << 20
_FACT_LENGTH = 500

log = logging.getLogger(__name__)


def main() -> int:
    """Load, serve, drain; the exit status."""
    configure_logging(NAME)
    try:
        launch = read_launch(NAME)
    except EngineError as error:
        exit_refused(error)
    return run(NAME, partial(_main, launch), FORBIDDEN)


async def _main(launch: Launch, process: Process) -> None:
    refusals: list[EngineError] = []
    thread = EngineThread(partial(_build, launch, refusals))
    thread.start()
    built = asyncio.wrap_future(thread.built)
    stopping = asyncio.create_task(process.stopping.wait())
    await asyncio.wait((built, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not built.done():
        return
    try:
        engine = built.result()
    except EngineError as error:
        exit_refused(error)
    await _serve(launch.socket, thread, engine, process, refusals)


async def _serve(
    socket: Path, thread: EngineThread, engine: EngineLoop, process: Process, refusals: list[EngineError]
) -> None:
    service = WorkerService(thread, engine.options.backend)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", _MAX_REQUEST_BYTES)])
    engine_pb2_grpc.add_WorkerServiceServicer_to_server(service, server)
    process.listen(server, socket)
    await server.start()
    process.feed_unless(partial(thread.stuck, _step_limit()))
    process.ready(
        {
            "MAX_CONTEXT_TOKENS": str(engine.max_context_tokens),
            "RUNS_AS": _runs_as(engine.options),
        }
        | ({DERIVED_REFUSED: _line(refusals[0])} if refusals else {})
    )
    await process.stopping.wait()
    await service.drain(_DRAIN_S)
    await server.stop(_STREAMS_GRACE_S)


def _runs_as(options: EngineOptions) -> str:
    """Which kernels serve, in which numbers and mode."""
    words = [options.backend]
    if options.backend == "native":
        from kernels.native.library import load

        words.append(load().isa)
    words.append(options.dtype)
    if options.kv_dtype != options.dtype:
        words.append(f"{options.kv_dtype}-kv")
    return " ".join([*words, *(["deterministic"] if options.deterministic else [])])


def _line(error: EngineError) -> str:
    """As a fact: of one line, and not too long."""
    return " ".join(str(error).split())[:_FACT_LENGTH]


def _step_limit() -> float:
    """Seconds one turn of the engine may take; without end where nobody says."""
    return float(os.environ.get(STEP_WITHIN_VARIABLE, "inf"))


def _build(launch: Launch, refusals: list[EngineError]) -> EngineLoop:
    """Load and hash the weights; torch is imported here, where its threads are set.

    Args:
        launch: of this worker.
        refusals: is told why a derived file was not used.

    Raises:
        EngineError: the deployment cannot run as asked.
    """
    cores = given_cores()
    keep_to(cores)
    from engine.build import build_engine

    try:
        options = to_options(launch.deployment.options)
        engine = build_engine(launch.files, launch.open_file, options, launch.derived, refusals.append)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise _too_large(launch) from error
    if len(cores) == engine.options.threads:
        _pin(cores)
    tokens = engine.options.kv_blocks * engine.options.block_size
    if tokens < engine.max_context_tokens and not engine.scheduler.limits.whole_prompts:
        raise EngineError(
            "KV_TOO_SMALL",
            f"{engine.options.kv_blocks} KV pages hold {tokens} tokens, less than one context of "
            f"{engine.max_context_tokens}; raise kv_blocks or lower max_context_tokens",
        )
    return engine


def _pin(cores: tuple[int, ...]) -> None:
    """Keep each thread that computes on a core of its own; without the native library, all of them on all."""
    from kernels.native.library import NativeUnavailable, load

    with contextlib.suppress(NativeUnavailable):
        if not load().pin(cores):
            log.warning("threads not pinned", extra={"cores": cores})


def _too_large(launch: Launch) -> EngineError:
    weights = sum(file.size for file in launch.files.matching(".safetensors"))
    pages = launch.deployment.options.kv_blocks or "as many as fit"
    return EngineError(
        "OUT_OF_MEMORY",
        f"memory ran out while loading: {weights} bytes of weights, KV pages: {pages}; {available_bytes()} "
        "bytes are available now; stop another deployment, or lower kv_blocks or max_context_tokens",
    )


if __name__ == "__main__":
    sys.exit(main())
