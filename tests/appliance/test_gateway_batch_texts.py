"""Embed and Rerank: what the gateway asks engine-text of a batch, when, and what comes of its refusals."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from appliance.gateway import batches
from tests.appliance.gateway_house import House, computed, open_house
from tests.appliance.test_gateway_batches import failure, until


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house() as opened:
        opened.worker.script = computed
        yield opened


async def test_a_long_query_is_copied_for_the_documents_that_are_at_engine_text_and_no_other(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, pair_of = [], batches._pair_of

    def counted(request: Any, index: int) -> Any:
        made.append(index)
        return pair_of(request, index)

    monkeypatch.setattr(batches, "_pair_of", counted)
    house.text.free.clear()
    async with house.client() as client:
        asked = asyncio.create_task(client.rerank("notes", "q" * 500_000, ["x"] * 256, truncate=True))
        await until(lambda: len(house.text.requests) == 2)
        await asyncio.sleep(0.05)
        assert made == [0, 1], "128 MB otherwise"
        house.text.free.set()
        assert len((await asked).results) == 256
    assert made == list(range(256))


async def test_what_else_the_tenant_asks_comes_between_the_inputs_of_a_batch(house: House) -> None:
    house.text.free.clear()
    async with house.client() as client:
        asked = asyncio.create_task(client.embed("notes", ["a"] * 40))
        await until(lambda: len(house.text.requests) == 2)
        other = asyncio.create_task(client.embed("notes", "xyz"))
        await until(lambda: len(house.control.asked("Authorize")) == 2)
        await asyncio.sleep(0.05)  # it waits for its turn
        house.text.free.set()
        await asyncio.gather(asked, other)
    assert [request.text for request in house.text.requests].index("xyz") < 6


async def test_a_request_is_sent_again_under_the_same_id_until_the_engine_is_there(house: House) -> None:
    await house.kill("text-notes")
    async with house.client() as client:
        asked = asyncio.create_task(client.embed("notes", "a"))
        await until(lambda: len(house.control.asked("Authorize")) >= 2)
        await house.start_text()
        await asked
    assert len({request.request_id for request in house.control.asked("Authorize")}) == 1


async def test_what_engine_text_refuses_of_one_input_names_it_and_charges_nothing(house: House) -> None:
    house.text.refuse = (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_OVERFLOW: the input has 99 tokens")
    async with house.client() as client:
        error = await failure(client.embed("notes", ["abc"]))
    assert (error.code, error.field) == ("CONTEXT_OVERFLOW", "inputs[0]")
    assert error.message == "inputs[0]: the input has 99 tokens"
    assert house.control.asked("Admit") == []
