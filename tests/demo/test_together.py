"""Attention in blocks, and several processes that train one model: against PyTorch's own, on random numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks.demo_models.attention import BLOCK, attend, in_blocks

TOGETHER = """
import sys, torch
from benchmarks.demo_models.together import average, exchange, place, share
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3)))
matrices = [p for p in model.parameters() if p.ndim == 2]
for n, p in enumerate(model.parameters()):
    torch.nn.init.constant_(p, float(n))
    p.grad = torch.full_like(p, float(rank * 2))
assert average(model, [float(rank)]) == [0.5]
assert all((p.grad == 1).all() for p in model.parameters())
for matrix in share(matrices):
    matrix.data.fill_(100.0 + rank)
exchange(matrices)
print([m[0, 0].item() for m in matrices])
"""


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_attention_in_blocks_is_causal_attention_and_so_are_its_gradients(length):
    torch.manual_seed(length)
    heads = [torch.randn(2, n, length, 8, dtype=torch.float64, requires_grad=True) for n in (6, 2, 2)]
    ours = in_blocks(*heads, 8**-0.5)
    theirs = functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for mine, its in zip(*(torch.autograd.grad(out, heads, weight) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, its)


def test_attention_in_blocks_refuses_a_mask():
    head = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="no mask"):
        attend(torch.nn.Identity(), head, head, head, torch.ones(4, 4), 1.0)


def test_two_processes_average_gradients_and_each_updates_its_share(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", TOGETHER]
    told = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], cwd=root, env=told, stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in both]
    assert said == ["[100.0, 101.0, 100.0]"] * 2
