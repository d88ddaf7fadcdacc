"""A CUDA graph has the bits of the starts that it was recorded from, kernel by kernel and for whole steps."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels.bench.starts import elsewhere, start, starts_of
from kernels.ops import KvSpec, Rows, Sampling
from kernels.sampling import sample
from kernels.steps import StepLimits
from kernels.triton.backend import TritonBackend
from kernels.triton.case import PROOF, Draw
from kernels.triton.families import FAMILIES
from kernels.triton.graphs import CudaRecorder, GraphedStep, RepeatingRecorder
from kernels.triton.launch import Launch
from tests.engine.families import PAGE, built, make
from tests.kernels.proofs import family_name


def memory(launches: list[Launch]) -> list[torch.Tensor]:
    """The bytes that starts read and write."""
    tensors = [
        arg for one in launches for arg in (*one.args, *one.options.values()) if isinstance(arg, torch.Tensor)
    ]
    empty = torch.empty(0, dtype=torch.uint8, device="cuda")
    return [empty.new_empty(0).set_(tensor.untyped_storage()) for tensor in tensors]


@pytest.mark.timeout(600)  # with what a first start compiles
@pytest.mark.parametrize("family", FAMILIES, ids=family_name)
def test_a_graph_of_kernels_writes_what_the_kernels_write(family: ModuleType) -> None:
    for case in family.cases(Draw("cuda"), PROOF):
        launches = starts_of(case.run)
        eager, recorded = elsewhere(launches), elsewhere(launches)
        start(eager)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            start(recorded)
        graph.replay()
        torch.cuda.synchronize()
        for one, other in zip(memory(eager), memory(recorded), strict=True):
            assert torch.equal(one, other), case.name


def drawing(count: int) -> Sampling:
    wide = torch.float64
    return Sampling(
        temperature=torch.tensor([0.0, 0.9, 1.3, 0.7], dtype=wide)[:count],
        top_k=torch.tensor([0, 40, 0, 5])[:count],
        top_p=torch.tensor([1.0, 1.0, 0.8, 1.0], dtype=wide)[:count],
        uniform=torch.tensor([0.1, 0.35, 0.8, 0.6], dtype=wide)[:count],
        min_p=torch.zeros(count, dtype=wide),
    )


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_recorded_step_has_the_bits_of_its_ops_and_draws_what_the_host_draws(
    family: str, deterministic: bool, tmp_path: Path
) -> None:
    tiny = make(tmp_path, family, {})
    ops = TritonBackend(torch.bfloat16, deterministic=deterministic, device="cuda")
    model: Any = built(tiny.config_json, tiny.tensors, ops)
    config: Any = tiny.config
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    spec = KvSpec(config["num_hidden_layers"], 16, PAGE, config["num_key_value_heads"], dim)
    limits = StepLimits(tokens=16, rows=4, context=4 * PAGE)
    with torch.inference_mode():
        recorders = CudaRecorder(), RepeatingRecorder()
        graphed, repeated = (GraphedStep(model, ops, ops.allocate_kv(spec), limits, one) for one in recorders)
        starts, tokens, tables = [0, 0, 0], [[5, 6], [7], [8, 9, 10]], [(1, 2), (3, 4), (5, 6)]
        for _ in range(4):
            counts = [len(some) for some in tokens]
            rows = Rows([one for some in tokens for one in some], starts, counts, tables)
            ends = [sum(counts[: at + 1]) - 1 for at in range(len(counts))]
            _, found, drawn = graphed.sampled(rows, ends, drawing(3))
            _, wanted, expected = repeated.sampled(rows, ends, drawing(3))
            assert torch.equal(found, wanted)
            said = drawn()
            assert said == expected() == sample(found.cpu(), drawing(3))
            starts = [at + count for at, count in zip(starts, counts, strict=True)]
            tokens = [[token] for token in said.token_ids]
