"""Counters of the engines, asked of all workers at once and never waited for longer than a moment."""

import asyncio
from collections.abc import Mapping

import grpc

from engine.protos import engine_pb2, engine_pb2_grpc

LIMIT_S = 0.3


async def ask(sockets: Mapping[str, str], limit_s: float = LIMIT_S) -> dict[str, engine_pb2.GetStatusResponse]:
    """What each worker says of itself, by the names of `sockets`; who does not say it in time is left out."""
    asked = {name: asyncio.create_task(_status(path, limit_s)) for name, path in sockets.items() if path}
    if not asked:
        return {}
    await asyncio.wait(asked.values(), timeout=limit_s)
    for task in asked.values():
        task.cancel()
    await asyncio.gather(*asked.values(), return_exceptions=True)
    done = {name: task for name, task in asked.items() if not task.cancelled() and task.exception() is None}
    return {name: task.result() for name, task in done.items()}


async def _status(path: str, limit_s: float) -> engine_pb2.GetStatusResponse:
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(f"unix:{path}", options=options) as channel:
        stub: engine_pb2_grpc.WorkerServiceAsyncStub = engine_pb2_grpc.WorkerServiceStub(channel)
        return await stub.GetStatus(engine_pb2.GetStatusRequest(), timeout=limit_s)
