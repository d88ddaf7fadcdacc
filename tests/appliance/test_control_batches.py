"""Requests of many inputs as control sees them: asked of models that answer them, reserved and charged as one."""

from collections.abc import AsyncIterator

import grpc
import pytest

from tests.appliance.control_house import CONTEXT, EMBED, House, new_house, refusal

Code = grpc.StatusCode


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with new_house() as made:
        yield made


@pytest.mark.parametrize(
    ("has", "method", "allowed"),
    [
        (["generate"], "Generate", True),
        (["generate"], "Chat", False),
        (["generate", "chat"], "Chat", True),
        (["generate", "chat"], "Embed", False),
        (["generate", "chat"], "Rerank", False),
        (["embed"], "Embed", True),
        (["embed"], "Rerank", False),
        (["embed"], "Generate", False),
        (["embed"], "Chat", False),
        (["rerank"], "Rerank", True),
        (["embed"], "Tokenize", True),
        ([], "Generate", False),
    ],
)
async def test_a_model_is_asked_only_for_what_it_answers(
    house: House, has: list[str], method: str, allowed: bool
) -> None:
    house.host.capabilities = has
    asked = house.authorize(await house.serving(), method=f"/cloister.inference.v1.InferenceService/{method}")
    if allowed:
        assert (await asked).deployment == "notes"
        return
    error = await refusal(asked)
    assert (error.status, error.code) == (Code.FAILED_PRECONDITION, "CAPABILITY_MISSING")
    assert error.metadata["capabilities"] == ",".join(has)
    (record,) = house.records("inference.refused")
    assert record.facts["reason"] == "CAPABILITY_MISSING"


async def test_a_batch_reserves_the_tokens_of_all_its_inputs_and_is_charged_what_was_computed(
    house: House,
) -> None:
    house.host.capabilities = ["embed"]
    caller = await house.serving()
    lease = (await house.admit(caller, 3 * CONTEXT, 0, inputs=3, method=EMBED)).lease
    assert (await house.tenant()).tokens_reserved == 3 * CONTEXT
    await house.settle(lease, prompt_tokens=3 * CONTEXT, completion_tokens=0, finish_reason="")
    tenant = await house.tenant()
    assert (tenant.tokens_reserved, tenant.tokens_used) == (0, 3 * CONTEXT)
    intent, outcome = house.records("inference.request")
    assert (intent.facts["method"], intent.facts["prompt_tokens"], intent.facts["max_tokens"]) == (
        EMBED, 3 * CONTEXT, 0,
    )  # fmt: skip
    assert (outcome.decision, outcome.facts["prompt_tokens"]) == ("completed", 3 * CONTEXT)


@pytest.mark.parametrize(
    ("method", "size", "code"),
    [
        ("Embed", (3 * CONTEXT + 1, 0, 3), "CONTEXT_OVERFLOW"),
        ("Embed", (2, 0, 3), "EMPTY_PROMPT"),
        ("Embed", (257, 0, 257), "TOO_MANY_INPUTS"),
        ("Embed", (3, 1, 3), "INVALID_MAX_TOKENS"),
        ("Embed", (3, 1, 0), "INVALID_PARAMETERS"),
        ("Generate", (3, 1, 1), "INVALID_PARAMETERS"),
        ("Chat", (3, 1, 1), "INVALID_PARAMETERS"),
    ],
)
async def test_a_batch_the_model_cannot_take_reserves_nothing(
    house: House, method: str, size: tuple[int, int, int], code: str
) -> None:
    house.host.capabilities = ["generate", "chat", "embed"]
    caller, prefix = await house.serving(), EMBED.removesuffix("Embed")
    error = await refusal(house.admit(caller, *size, method=f"{prefix}{method}"))
    assert (error.status, error.code) == (Code.INVALID_ARGUMENT, code)
    assert (await house.tenant()).tokens_reserved == 0
