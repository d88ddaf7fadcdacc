"""What products leave behind in memory does not grow with the number of sizes that steps have had."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GROWTH = """
from pathlib import Path
import torch
from kernels.cpu import CpuBackend

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

torch.set_num_threads(1)
ops = CpuBackend(torch.bfloat16)
weights = [ops.prepare_linear([torch.randn(n, 384)]) for n in (768, 384, 2048, 1024)]
ops.linear(torch.randn(1, 384).bfloat16(), weights[0])
before = held()
for tokens in range(2, 62):
    for weight in weights:
        ops.linear(torch.randn(tokens, 384).bfloat16(), weight)
print(held() - before)
"""


def test_products_of_many_sizes_in_bfloat16_leave_little_behind() -> None:
    done = subprocess.run([sys.executable, "-c", GROWTH], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60 * 1024  # kB; 240 kept kernels would be 140 MB
