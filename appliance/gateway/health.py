"""grpc.health.v1: whether a service answers now, for load balancers and monitors.

Ours rather than grpcio-health-checking's servicer, which stops telling the other watchers once one of them leaves.

Source: grpc/health/v1/health.proto.
"""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

SERVICE = "grpc.health.v1.Health"
_Context = grpc.aio.ServicerContext[Any, Any]


class Health:
    """The health of every service by name; the empty name is the whole gateway."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = frozenset(("", *services))
        self._serving = False
        self._changed = asyncio.Condition()

    async def set(self, serving: bool) -> None:
        """All services answer, or none does."""
        if serving != self._serving:
            async with self._changed:
                self._serving = serving
                self._changed.notify_all()

    async def Check(  # noqa: N802 - the method's name in the protocol
        self, request: Any, context: _Context
    ) -> Any:
        """The health of one service.

        Raises:
            grpc.RpcError: NOT_FOUND; there is no such service.
        """
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(  # noqa: N802 - the method's name in the protocol
        self, request: Any, context: _Context
    ) -> None:
        """The health of one service, now and at each change."""
        told = None
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._status(request.service) != told)  # noqa: B023
                told = self._status(request.service)
            await context.write(health_pb2.HealthCheckResponse(status=told))

    def _status(self, service: str) -> Any:
        known = health_pb2.HealthCheckResponse
        if service not in self._services:
            return known.SERVICE_UNKNOWN
        return known.SERVING if self._serving else known.NOT_SERVING
