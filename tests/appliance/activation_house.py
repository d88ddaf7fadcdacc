"""A control plane and a real gateway in one home; engines are small servers that say what the test lets them."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from appliance.control.home import Home
from appliance.gateway.server import Gateway
from appliance.protos import admin_pb2
from bundles.protos import importer_pb2
from engine.process import Process
from engine.protos import engine_pb2_grpc
from tests.appliance.control_house import House, make_home, running, until
from tests.appliance.gateway_house import FakeText, FakeWorker, say


def canary(expected: str, match: str = "exact", asks: str = "SECRET QUESTION") -> importer_pb2.Canary:
    """One canary."""
    messages = [importer_pb2.CanaryMessage(role="user", content=asks)]
    return importer_pb2.Canary(messages=messages, match=match, expected=expected, max_tokens=8)


class Site:
    """The house with a gateway and one engine that all deployments share."""

    def __init__(self, home: Home) -> None:
        self.house = House(home)
        self.worker = FakeWorker()
        self.worker.script = say("all", " well")
        self.text = FakeText()
        self.gateway: Gateway | None = None

    async def activate(self, version: str, alias: str = "notes", **fields: Any) -> list[admin_pb2.Activation]:
        """Every step of an activation."""
        request = admin_pb2.ActivateModelRequest(model_version=version, alias=alias, **fields)
        return [told.activation async for told in self.house.models.ActivateModel(request)]

    async def rollback(self, alias: str = "notes") -> list[admin_pb2.Activation]:
        """Every step of a rollback."""
        request = admin_pb2.RollbackAliasRequest(alias=alias)
        return [told.activation async for told in self.house.models.RollbackAlias(request)]

    async def aliases(self) -> dict[str, str]:
        """What points where."""
        listed = await self.house.models.ListAliases(admin_pb2.ListAliasesRequest())
        return {a.name: a.deployment for a in listed.aliases}

    async def deployed(self) -> dict[str, str]:
        """Version by deployment."""
        listed = await self.house.models.ListDeployments(admin_pb2.ListDeploymentsRequest())
        return {d.name: d.model_version for d in listed.deployments}

    async def states(self) -> dict[str, str]:
        """State by version."""
        listed = await self.house.models.ListModelVersions(admin_pb2.ListModelVersionsRequest())
        return {f"{v.name}@{v.version}": v.state for v in listed.versions}

    def told(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        """Decision and facts of every record of a kind."""
        return [(r.decision, dict(r.facts)) for r in self.house.records(kind)]


@asynccontextmanager
async def open_site(home: Home, site: Site | None = None, gateway: bool = True) -> AsyncIterator[Site]:
    """Control, gateway and engines in `home`."""
    site = site or Site(home)
    process = Process("gateway")
    worker, text = str(home.run / "worker-x.sock"), str(home.run / "text-x.sock")
    engines = [grpc.aio.server(), grpc.aio.server()]
    engine_pb2_grpc.add_WorkerServiceServicer_to_server(site.worker, engines[0])
    engine_pb2_grpc.add_TextServiceServicer_to_server(site.text, engines[1])
    for server, path in zip(engines, (worker, text), strict=True):
        server.add_insecure_port(f"unix:{path}")
        await server.start()
    site.house.host.sockets = (worker, text)
    try:
        async with running(home, site.house):
            serving = None
            if gateway:
                site.gateway = Gateway(home.root, "127.0.0.1:0")
                serving = asyncio.create_task(site.gateway.serve(process))
                await until(lambda: site.house.plane.leases.gateway_address)
            await until(lambda: site.house.plane.deployments.connected)
            yield site
            process.stop()
            if serving is not None:
                await serving
    finally:
        for server in engines:
            await server.stop(None)


@asynccontextmanager
async def new_site(**options: Any) -> AsyncIterator[Site]:
    """The same in a home of its own, gone afterwards."""
    home = make_home()
    try:
        async with open_site(home, **options) as site:
            yield site
    finally:
        shutil.rmtree(home.root.parent)
