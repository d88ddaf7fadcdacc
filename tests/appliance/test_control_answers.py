"""Several answers to one prompt, and calls that nobody admits, as control sees them."""

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from appliance.control.admission.tickets import Ticket, TicketBook
from appliance.control.identity.callers import Principal
from appliance.errors import CloisterError
from appliance.protos import control_pb2
from tests.appliance.control_house import CONTEXT, PROMPT, House, new_house, refusal


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with new_house() as made:
        yield made


async def admission(house: House, caller: control_pb2.Caller, **size: int) -> Any:
    ticket = (await house.authorize(caller)).ticket
    return await house.control.Admit(control_pb2.AdmitRequest(ticket=ticket, prompt_sha256=PROMPT, **size))


async def test_the_prompt_is_reserved_once_and_every_answer_in_full(house: House) -> None:
    caller = await house.serving()
    admitted = await admission(house, caller, prompt_tokens=10, max_tokens=20, answers=8)
    assert (await house.tenant()).tokens_reserved == 10 + 8 * 20
    await house.control.AwaitIntent(control_pb2.AwaitIntentRequest(lease=admitted.lease))
    await house.settle(admitted.lease, prompt_tokens=10, completion_tokens=40)
    tenant = await house.tenant()
    assert (tenant.tokens_used, tenant.tokens_reserved) == (50, 0)


async def test_each_answer_has_the_context_beside_the_prompt_for_itself(house: House) -> None:
    caller = await house.serving()
    await admission(house, caller, prompt_tokens=10, max_tokens=CONTEXT - 10, answers=8)
    error = await refusal(admission(house, caller, prompt_tokens=11, max_tokens=CONTEXT - 10, answers=2))
    assert error.code == "CONTEXT_OVERFLOW"
    assert (await house.tenant()).tokens_reserved == 10 + 8 * (CONTEXT - 10)


async def test_more_answers_than_any_request_has_reserve_nothing(house: House) -> None:
    caller = await house.serving()
    error = await refusal(admission(house, caller, prompt_tokens=1, max_tokens=1, answers=9))
    assert error.code == "TOO_MANY_ANSWERS"
    assert (await house.tenant()).tokens_reserved == 0


@pytest.mark.parametrize("method", ["Tokenize", "Detokenize"])
async def test_what_is_never_admitted_gets_a_place_and_no_ticket(house: House, method: str) -> None:
    caller = await house.serving()
    where = await house.authorize(caller, method=f"/cloister.inference.v1.InferenceService/{method}")
    assert (where.text_socket, where.ticket) == ("/t.sock", "")
    assert house.plane.control._tickets._tickets == {}
    hidden = await refusal(
        house.authorize(caller, method=f"/cloister.inference.v1.InferenceService/{method}", model="hidden")
    )
    assert hidden.code == "MODEL_NOT_FOUND"


def ticket_of(tenant: str) -> Ticket:
    principal = Principal(
        tenant=tenant, application="app", key_id="k", certificate_sha256=b"c" * 32, max_concurrent=4
    )
    return Ticket(principal, "/m", str(uuid.uuid4()), "g", "notes", "notes", "d", CONTEXT)


def test_a_tenant_that_leaves_tickets_behind_takes_none_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.control.admission.tickets._MOST_OF_A_TENANT", 5)
    book = TicketBook()
    quiet = book.issue(ticket_of("quiet"))
    names = [book.issue(ticket_of("busy")) for _ in range(9)]
    assert len(book._tickets) == 6
    for name in names[:4]:
        with pytest.raises(CloisterError, match="TICKET_INVALID"):
            book.take(name)
    assert [book.take(name).principal.tenant for name in (*names[4:], quiet)] == ["busy"] * 5 + ["quiet"]
    assert (book._tickets, book._of_tenant) == ({}, {})
