"""Vectors through the one scheduler: whole texts without pages, and the last tokens of decoders with them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import EngineError
from engine.loop import EngineLoop
from engine.memory_plan import read_model
from engine.plan import StepPlan, StepResult
from engine.protos import engine_pb2
from engine.request import EndReason, Task
from engine.worker.outbox import Outbox
from engine.worker.translate import to_requests, to_row
from tests.engine.tiny import engine, file_set, request, run, save_llama
from tests.engine.vector_models import add_modules, ask, change_config, hidden_states, save, texts, vectors


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("bert")
    return folder, save(folder, "bert")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A decoder as embedders are published: the name of the whole, the tensors of the decoder alone."""
    folder = tmp_path_factory.mktemp("qwen3")
    model = save(folder, "qwen3", num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    change_config(folder, architectures=["Qwen3ForCausalLM"])
    add_modules(folder, "pooling_mode_lasttoken", "Normalize")
    return folder, model


class Watch:
    """A runner that keeps the plans, and can be made to break."""

    def __init__(self, loop: EngineLoop) -> None:
        self.runner: Any = loop._runner
        self.plans: list[StepPlan] = []
        self.out_of_memory_above = math.inf
        self.nan: set[int] = set()
        loop._runner = self

    def execute(self, plan: StepPlan) -> StepResult:
        if sum(len(row.token_ids) for row in plan.rows) > self.out_of_memory_above:
            raise MemoryError
        self.plans.append(plan)
        result: StepResult = self.runner.execute(plan)
        return result

    @property
    def steps(self) -> list[list[tuple[int, int]]]:
        """Of each step, the handle and the token count of each row."""
        return [[(row.handle, len(row.token_ids)) for row in plan.rows] for plan in self.plans]


def test_texts_are_computed_whole_in_steps_of_limited_size_and_take_no_pages(bert: tuple[Path, Any]) -> None:
    loop = engine(bert[0], max_step_tokens=100, max_running=8)
    watch = Watch(loop)
    prompts = [[7] * length for length in (60, 50, 30, 90, 1, 5, 96)]
    answers = ask(loop, prompts)
    assert all(sum(count for _, count in step) <= 100 for step in watch.steps)
    assert sorted(row for step in watch.steps for row in step) == [(i, len(p)) for i, p in enumerate(prompts)]
    assert len(watch.steps) < len(prompts)
    assert not any(table.blocks for plan in watch.plans for row in plan.rows for table in row.block_tables)
    assert [answer.end.prompt_tokens for answer in answers] == [len(prompt) for prompt in prompts]
    assert {answer.end.reason for answer in answers} == {EndReason.STOP}
    assert {answer.end.completion_tokens for answer in answers} == {0}
    assert loop.status().tokens_prefilled == sum(map(len, prompts))


def test_a_text_that_fills_a_step_is_not_passed_over_for_ever(bert: tuple[Path, Any]) -> None:
    loop = engine(bert[0], max_step_tokens=96, max_running=8)
    watch = Watch(loop)
    loop.submit(request(0, [7] * 50, task=Task.EMBED))
    loop.submit(request(1, [7] * 96, task=Task.EMBED))
    for handle in range(2, 30):
        loop.submit(request(handle, [7], task=Task.EMBED, scope="a"))
    run(loop)
    assert [step for step in watch.steps[:2] if (1, 96) in step] == [[(1, 96)]]


def test_what_no_step_or_model_can_take_is_refused_when_it_is_submitted(bert: tuple[Path, Any]) -> None:
    loop = engine(bert[0])
    assert loop.max_context_tokens == 96
    ask(loop, [[7] * 96])
    cases: list[tuple[list[int], Task, dict[str, Any], str]] = [
        ([7] * 97, Task.EMBED, {}, "CONTEXT_OVERFLOW"),
        ([7, 99], Task.EMBED, {}, "TOKEN_OUT_OF_RANGE"),
        ([7], Task.SCORE, {}, "TASK_UNSUPPORTED"),
        ([7], Task.GENERATE, {}, "TASK_UNSUPPORTED"),
        ([7, 8], Task.EMBED, {"type_ids": [0, 2]}, "INVALID_TYPE_IDS"),
        ([7, 8], Task.EMBED, {"type_ids": [0]}, "INVALID_TYPE_IDS"),
    ]
    for prompt, task, rest, code in cases:
        with pytest.raises(EngineError) as error:
            loop.submit(request(1, prompt, task=task, **rest))
        assert error.value.code == code
    assert not loop.has_work
    assert engine(bert[0], max_step_tokens=40, max_running=4).max_context_tokens == 40
    served = read_model(*file_set(bert[0])).served
    assert [served.context(*asked) for asked in ((0, 0), (0, 40), (30, 40), (50, 40))] == [96, 40, 30, 40]


def test_steps_that_run_out_of_memory_are_smaller_and_every_text_gets_its_vector(bert: tuple[Path, Any]) -> None:
    prompts = texts(8, longest=50)
    expected = vectors(engine(bert[0]), prompts)
    loop = engine(bert[0])
    watch = Watch(loop)
    watch.out_of_memory_above = 60
    torch.testing.assert_close(vectors(loop, prompts), expected, rtol=0, atol=1e-5)
    assert all(sum(count for _, count in step) <= 60 for step in watch.steps)
    watch.out_of_memory_above = 30
    answers = ask(loop, [[7] * 10, [7] * 40, [7] * 20])
    assert [answer.end.error_code for answer in answers] == ["", "OUT_OF_MEMORY", ""]


def test_numbers_that_overflow_end_their_own_request_alone(tmp_path: Path) -> None:
    save(tmp_path, "bert")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][50] = math.inf
    save_file(tensors, tmp_path / "model.safetensors")
    for options in ({}, {"deterministic": True}, {"backend": "reference"}):
        answers = ask(engine(tmp_path, **options), [[7, 8], [9, 50, 9], [10]])
        assert [answer.end.error_code for answer in answers] == ["", "NUMERIC_FAULT", ""]
        assert [len(answer.values) for answer in answers] == [32, 0, 32]


def test_an_aborted_text_leaves_nothing_behind(bert: tuple[Path, Any]) -> None:
    loop = engine(bert[0], max_step_tokens=100, max_running=2)
    for handle in range(5):
        loop.submit(request(handle, [7] * 60, task=Task.EMBED))
    loop.step()
    loop.abort(1)
    loop.abort(4)
    answers = run(loop)
    assert answers[1].end.reason is answers[4].end.reason is EndReason.ABORTED
    assert not answers[1].values
    assert len(answers[2].values) == 32
    assert (loop.scheduler.num_running, loop.scheduler.num_waiting) == (0, 0)


def test_scopes_get_their_shares_of_steps(bert: tuple[Path, Any]) -> None:
    loop = engine(bert[0], max_step_tokens=60, max_running=2)
    watch = Watch(loop)
    for handle in range(10):
        loop.submit(request(handle, [7] * 50, task=Task.EMBED, scope="many"))
    loop.submit(request(10, [7] * 50, task=Task.EMBED, scope="few"))
    run(loop)
    order = [handle for step in watch.steps for handle, _ in step]
    assert order.index(10) <= 2


@pytest.mark.parametrize(
    "options",
    [{}, {"deterministic": True}, {"backend": "reference"}, {"max_step_tokens": 20, "max_running": 4}],
    ids=str,
)
def test_a_decoder_gives_the_last_tokens_hidden_state_in_chunks_and_out_of_its_cache(
    embedder: tuple[Path, Any], options: dict[str, Any]
) -> None:
    folder, model = embedder
    prompts = texts(5)
    expected = torch.stack([hidden_states(model, prompt)[-1] for prompt in prompts])
    loop = engine(folder, **options)
    normal = torch.nn.functional.normalize(expected)
    for _ in range(2):
        torch.testing.assert_close(vectors(loop, prompts, salt=b"s"), normal, rtol=0, atol=1e-4)
    assert loop.status().tokens_cached > 0
    assert loop.status().blocks_total == 64


def test_a_decoders_vector_has_the_same_bits_whatever_shares_the_step(embedder: tuple[Path, Any]) -> None:
    loop = engine(embedder[0], deterministic=True)
    prompts = texts(8)
    alone = torch.cat([vectors(loop, [prompt]) for prompt in prompts])
    assert torch.equal(alone, vectors(loop, prompts))
    assert torch.equal(
        alone, vectors(engine(embedder[0], deterministic=True, max_step_tokens=24, max_running=8), prompts)
    )


def test_a_decoder_alone_embeds_by_its_last_token_and_a_text_may_fill_its_context(tmp_path: Path) -> None:
    model = save(tmp_path, "qwen3", num_key_value_heads=2, head_dim=8)
    loop = engine(tmp_path)
    prompt = texts(3, longest=96)[2]
    found = vectors(loop, [prompt])[0]
    torch.testing.assert_close(found, hidden_states(model, prompt)[-1], rtol=0, atol=1e-4)
    with pytest.raises(EngineError, match="CONTEXT_OVERFLOW"):
        ask(loop, [[*prompt, 5]])


def test_a_decoder_with_its_matrix_of_logits_can_be_an_embedder_too(tmp_path: Path) -> None:
    save_llama(tmp_path, hidden_size=32)
    generates = engine(tmp_path)
    generates.submit(request(0, [5, 6, 7], 2))
    assert run(generates)[0].token_ids
    add_modules(tmp_path, "pooling_mode_lasttoken")
    loop = engine(tmp_path)
    assert len(vectors(loop, [[5, 6, 7]])[0]) == 32
    with pytest.raises(EngineError, match="TASK_UNSUPPORTED"):
        loop.submit(request(0, [5, 6, 7], 2))
    add_modules(tmp_path, "pooling_mode_mean_tokens")
    with pytest.raises(EngineError, match="POOLING_UNSUPPORTED"):
        engine(tmp_path)


def test_a_submission_for_a_vector_becomes_one_request_and_its_row_carries_the_values() -> None:
    submit = engine_pb2.Submit(
        handle=4, scope="a", weight=2, token_ids=[5, 6], type_ids=[0, 1], task=engine_pb2.TASK_EMBED
    )
    (one,) = to_requests([9], submit)
    assert (one.handle, one.task, one.type_ids, one.weight, one.limit) == (9, Task.EMBED, (0, 1), 2, 0)
    submit.task = engine_pb2.TASK_SCORE
    assert to_requests([9], submit)[0].task is Task.SCORE
    with pytest.raises(EngineError, match="INVALID_REQUEST"):
        to_requests([9, 10], submit)


def test_a_row_carries_its_values_to_the_session(bert: tuple[Path, Any]) -> None:
    loop = engine(bert[0])
    loop.submit(request(1, [5, 6], task=Task.EMBED))
    (row,) = loop.step()
    message = to_row(7, 0, row)
    assert message.handle == 7
    assert tuple(message.values) == row.values
    assert message.end.reason == engine_pb2.END_REASON_STOP
    outbox = Outbox()
    assert outbox.push(1, [engine_pb2.Row(handle=7), message])
