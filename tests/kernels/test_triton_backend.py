"""The Triton backend in the interpreter: models of every family against float64, and decode steps as graphs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.ops import Adjustments, KvSpec, Rows, Sampling
from kernels.packed import Packed
from kernels.reference import ReferenceBackend
from kernels.sampling import sample
from kernels.steps import StepLimits, StepModel
from kernels.triton.backend import TritonBackend
from kernels.triton.graphs import Graph, GraphedStep, RepeatingRecorder
from kernels.triton.kv_cache import KvPages
from tests.engine.families import FAMILIES, PAGE, Tiny, built, computed, draw_tokens, make

PROMPTS = [draw_tokens(1, 9), draw_tokens(2, 5)]  # longer than a window is
LIMITS = StepLimits(tokens=16, rows=4, context=32)


def tiny(folder: Path, family: str) -> Tiny:
    """Of two layers where they differ, else of one."""
    return make(folder, family, {"num_hidden_layers": 1 + (FAMILIES[family].get("sliding_window") is not None)})


def logits(model: Tiny, ops: Any) -> torch.Tensor:
    return torch.cat(computed(model.config_json, model.tensors, ops, PROMPTS)).double()


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Of all numbers, beside how far they spread."""
    return float((found - exact).norm() / (exact - exact.mean()).norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_each_family_comes_to_what_float64_does(family: str, tmp_path: Path) -> None:
    model = tiny(tmp_path, family)
    exact = logits(model, ReferenceBackend(torch.float64))
    found = logits(model, TritonBackend(torch.float32, device="cpu"))
    assert (found - exact).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def exact(llama: Tiny) -> torch.Tensor:
    return logits(llama, ReferenceBackend(torch.float64))


@pytest.mark.parametrize(("kv_dtype", "worst"), [("", 1.5), ("int8", 1.8), ("float8", 6.0)])
def test_fewer_bits_cost_about_what_their_rounding_does(
    llama: Tiny, exact: torch.Tensor, kv_dtype: str, worst: float
) -> None:
    floor = distance(logits(llama, ReferenceBackend(torch.bfloat16)), exact)
    found = distance(logits(llama, TritonBackend(torch.bfloat16, kv_dtype, device="cpu")), exact)
    assert found <= worst * floor


def test_in_deterministic_mode_a_row_has_the_bits_it_has_alone(llama: Tiny) -> None:
    ops = TritonBackend(torch.float32, deterministic=True, device="cpu")
    both = computed(llama.config_json, llama.tensors, ops, PROMPTS, chunk=8)
    for prompt, beside in zip(PROMPTS, both, strict=True):
        (alone,) = computed(llama.config_json, llama.tensors, ops, [prompt], chunk=PAGE)
        assert torch.equal(alone, beside)


class Served:
    """A model over pages, with rows that are answered token by token."""

    def __init__(self, llama: Tiny, deterministic: bool = False) -> None:
        self.ops = TritonBackend(torch.float32, deterministic=deterministic, device="cpu")
        self.model: StepModel = built(llama.config_json, llama.tensors, self.ops)
        self.recorder = CountingRecorder()
        self.tolerance = (
            0.0 if deterministic else 1e-5
        )  # torch's own products of three rows differ from those of four
        config: Any = llama.config
        heads = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
        self.spec = KvSpec(config["num_hidden_layers"], 40, PAGE, *heads)

    def pages(self) -> KvPages:
        """Full of what no step may read."""
        kv = self.ops.allocate_kv(self.spec)
        for numbers in (kv.keys, kv.values):
            numbers.fill_(float("nan"))
        return kv

    def step(self, kv: KvPages) -> GraphedStep:
        return GraphedStep(self.model, self.ops, kv, LIMITS, self.recorder, is_lazy=True)

    def op_by_op(self, kv: KvPages, rows: Rows) -> torch.Tensor:
        hidden = self.model(self.ops, kv, self.ops.begin(rows, kv))
        return self.model.logits(self.ops, hidden, range(len(rows.token_ids)))


class CountingRecorder(RepeatingRecorder):
    """Knows how often a graph was recorded."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, body: Any) -> Graph:
        self.recorded += 1
        return super().record(body)


@pytest.fixture
def served(llama: Tiny) -> Iterator[Served]:
    with torch.inference_mode():
        yield Served(llama)


TABLES = [(3, 9, 20), (4, 1, 11), (7, 30, 2), (13, 5, 17)]
STARTED = Rows(draw_tokens(3, 9), [0, 0, 0], [5, 1, 3], TABLES[:3])


def next_rows(tokens: Sequence[int], before: Rows = STARTED) -> Rows:
    """Each row a token longer."""
    starts = [start + count for start, count in zip(before.starts, before.counts, strict=True)]
    return Rows(tokens, starts, [1] * len(starts), before.block_tables)


@pytest.mark.parametrize("deterministic", [False, True])
@torch.inference_mode()
def test_a_bucket_that_is_filled_up_has_the_bits_of_the_step_alone(llama: Tiny, deterministic: bool) -> None:
    served = Served(llama, deterministic)
    graphed, plain = served.pages(), served.pages()
    step = served.step(graphed)
    rows = STARTED
    for tokens in ([5, 6, 7], [8, 9, 10], [2, 3, 4]):  # the first of these steps is of prompts
        found, expected = step(rows, range(len(rows.token_ids)))[1], served.op_by_op(plain, rows)
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=served.tolerance)
        rows = next_rows(tokens, rows)
    one = Rows([9], [7], [1], TABLES[:1])
    torch.testing.assert_close(step(one, [0])[1], served.op_by_op(plain, one), rtol=0, atol=served.tolerance)
    assert served.recorder.recorded == 2  # of four rows and of one


def drawing(count: int, **changes: Any) -> Sampling:
    wide = torch.float64
    given = Sampling(
        temperature=torch.tensor([0.0, 0.9, 1.3, 0.7], dtype=wide)[:count],
        top_k=torch.tensor([0, 40, 0, 5])[:count],
        top_p=torch.tensor([1.0, 1.0, 0.8, 1.0], dtype=wide)[:count],
        uniform=torch.tensor([0.1, 0.35, 0.8, 0.6], dtype=wide)[:count],
        min_p=torch.zeros(count, dtype=wide),
    )
    return given._replace(**changes)


def test_tokens_are_drawn_inside_a_step_and_taken_from_there_by_the_next(served: Served) -> None:
    kv = served.pages()
    step = served.step(kv)
    ends = [4, 5, 8]
    _, first, drawn = step.sampled(STARTED, ends, drawing(3))
    assert drawn() == sample(first, drawing(3))
    rows = next_rows([-1, -2, -3])
    _, second, again = step.sampled(rows, [0, 2], drawing(2))
    second, said = second.clone(), again()
    assert said == sample(second, drawing(2))
    told = next_rows(drawn().token_ids)
    assert torch.equal(served.step(kv)(told, [0, 2])[1], second)  # type: ignore[arg-type]  # some were picked
    chosen = next_rows([-1, 5, -2], rows)
    _, third, last = step.sampled(chosen, [2], drawing(1))
    third, _ = third.clone(), last()
    told = next_rows([said.token_ids[0], 5, said.token_ids[1]], rows)
    assert torch.equal(served.step(kv)(told, [2])[1], third)  # type: ignore[arg-type]  # one was picked


def test_adjusted_rows_are_drawn_from_what_they_come_to(served: Served) -> None:
    step = served.step(served.pages())
    step.sampled(STARTED, [4, 5, 8], drawing(3))[2]()
    rows = next_rows([5, 6, 7])
    logits = step(rows, [0, 2])[1]
    assert logits is not None
    logits = logits.clone()
    likeliest = logits.argmax(-1)
    number = torch.ones(1, dtype=torch.float64)
    none = torch.zeros(0, dtype=torch.int64)
    nothing = none, none, none.double(), none.double()
    adjustments = Adjustments(
        (torch.tensor([1]), likeliest[1:]), (torch.tensor([0]), torch.tensor([7]), 50 * number), nothing
    )
    asked = drawing(2, temperature=torch.zeros(2, dtype=torch.float64), adjustments=adjustments)
    _, _, drawn = step.sampled(rows, [0, 2], asked)
    found = drawn()
    assert found == sample(logits, asked)
    assert found.token_ids[0] == 7
    assert found.token_ids[1] != likeliest[1]


def test_a_step_beyond_its_limits_is_refused(served: Served) -> None:
    step = served.step(served.pages())
    for rows in (Rows([1] * 17, [0], [17], [TABLES[0]]), Rows([1] * 5, [0] * 5, [1] * 5, [(0,)] * 5)):
        with pytest.raises(ValueError, match="is beyond"):
            step(rows, [0])


@pytest.mark.parametrize(("rows", "is_rounded"), [(16, False), (17, True)])
def test_inputs_of_e4m3_matrices_are_rounded_where_there_are_many(rows: int, is_rounded: bool) -> None:
    made = torch.Generator().manual_seed(3)
    codes = torch.randn(48, 128, generator=made).to(torch.float8_e4m3fn)
    backend = TritonBackend(torch.bfloat16, device="cpu")
    x = torch.randn(rows, 128, generator=made).bfloat16()
    y = backend.linear(x, backend.prepare_linear([Packed(codes, torch.ones(48, 1), 1, 128, 8)]))
    scale = x.double().abs().amax(1, keepdim=True) / 448
    rounded = (x.double() / scale).float().to(torch.float8_e4m3fn).double() * scale
    exact = (rounded if is_rounded else x.double()) @ codes.double().T
    floor = (exact.bfloat16().double() - exact).norm()
    assert (y.double() - exact).norm() <= 1.5 * floor
