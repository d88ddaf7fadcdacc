"""Writes packed_by_upstream.json: small matrices packed by the code of AutoAWQ, AutoGPTQ and GPTQModel themselves.

These packages demand GPUs, compilers or another torch, so they are not among the test tools; of each, the packing
functions alone are run here, taken by name out of its unpacked source and given nothing but torch and numpy:

    pip download --no-deps -d wheels autoawq==0.2.9 auto-gptq==0.7.1 gptqmodel==7.7.0  # unpack into FOLDER
    python -m tests.engine.upstream_packers FOLDER
"""

import ast
import base64
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLACE = Path(__file__).with_name("packed_by_upstream.json")
_AWQ = "autoawq-0.2.9/awq/modules/linear/gemm.py"
_AUTOGPTQ = "auto_gptq/nn_modules/qlinear/qlinear_cuda.py"
_GPTQMODEL = "gptqmodel-7.7.0/gptqmodel/nn_modules/qlinear/__init__.py"
_GPTQMODEL_V1 = "gptqmodel-7.7.0/gptqmodel/utils/model.py"


def function(path: Path, name: str, **scope: Any) -> Any:
    """One function out of a file, however its module looks, in a scope of ours."""
    found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == name]
    node = found[0]
    node.decorator_list, node.returns = [], None
    for argument in (*node.args.args, *node.args.kwonlyargs):
        argument.annotation = None
    module = ast.Module([node], [])
    exec(compile(ast.fix_missing_locations(module), path.name, "exec"), scope)
    return scope[name]


class Layer(nn.Module):
    """As much of a quantised layer as packing fills in."""

    def __init__(self, w_bit: int, group_size: int, inner: int, out: int, *_: Any) -> None:
        super().__init__()
        self.w_bit = self.bits = w_bit
        self.group_size, self.in_features, self.infeatures, self.outfeatures = group_size, inner, inner, out
        self.maxq, self.pack_factor, self.pack_dtype, self.pack_dtype_bits = (
            2**w_bit - 1,
            32 // w_bit,
            torch.int32,
            32,
        )
        self.pack_np_math_dtype, self.pack_np_dtype, self.planar = np.uint32, np.int32, False
        self.register_buffer("g_idx", None)

    def qzero_format(self, **_: int) -> None:
        """Noted down by upstream only."""


def plain(bits: int, out: int, inner: int, group: int, lowest_zero: int, symmetric: bool, order: Tensor) -> Any:
    """Codes [out, in], scales and zeros [out, groups], and the linear layer they stand for."""
    groups = math.ceil(inner / group)
    codes = torch.randint(0, 2**bits, (out, inner))
    scales = (torch.rand(out, groups) * 0.1 + 0.01).half().float()
    zeros = torch.randint(lowest_zero, 2**bits, (out, groups)).float()
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    linear = nn.Linear(inner, out, bias=False)
    linear.weight.data = (codes - zeros[:, order]) * scales[:, order]
    return codes, scales, zeros, linear


def tensors(layer: Any, *names: str) -> dict[str, Any]:
    return {name: encode(getattr(layer, name)) for name in names}


def means(codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor) -> dict[str, Any]:
    """What was packed: codes [out, in], scales and zeros [out, groups], and the group of each input."""
    return {
        "codes": encode(codes.byte()),
        "scales": encode(scales),
        "zeros": encode(zeros.byte()),
        "order": encode(order.byte()),
    }


def encode(tensor: Tensor) -> dict[str, Any]:
    array = tensor.detach().contiguous().numpy()
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "data": base64.b64encode(array.tobytes()).decode(),
    }


def awq(folder: Path, group: int) -> dict[str, Any]:
    order = torch.arange(64) // group
    codes, scales, zeros, linear = plain(4, 32, 64, group, 0, False, order)
    pack = function(folder / _AWQ, "from_linear", torch=torch, get_best_device=lambda: "cpu")
    layer = pack(Layer, linear, 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return {"by": "AutoAWQ 0.2.9", "config": config, "means": means(codes, scales, zeros, order),
            "stored": tensors(layer, "qweight", "qzeros", "scales")}  # fmt: skip


def gptq(
    folder: Path, by: str, bits: int, group: int, symmetric: bool, ordered: bool, version: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(bits + group)
    order = (torch.arange(64) // group)[torch.randperm(64, generator=generator) if ordered else slice(None)]
    is_new = by.startswith("GPTQModel")
    codes, scales, zeros, linear = plain(bits, 32, 64, group, 0 if is_new else 1, symmetric, order)
    layer = Layer(bits, group, 64, 32)
    if is_new:
        scope = {"t": torch, "nn": nn, "np": np, "math": math, "_ConvNd": nn.Conv2d}
        scope["THREADPOOLCTL"] = SimpleNamespace(threadpool_limits=lambda _: nullcontext())
        scope["transformers"] = SimpleNamespace(pytorch_utils=SimpleNamespace(Conv1D=nn.Conv1d))
        pack = function(folder / _GPTQMODEL, "pack_original", **scope)
    else:
        scope = {"torch": torch, "nn": nn, "np": np, "math": math}
        scope["transformers"] = SimpleNamespace(pytorch_utils=SimpleNamespace(Conv1D=nn.Conv1d))
        pack = function(folder / _AUTOGPTQ, "pack", **scope)
    pack(layer, linear, scales.clone(), zeros.clone(), order.int())
    if is_new and version == 1:
        quiet = SimpleNamespace(info=SimpleNamespace(once=lambda _: None))
        convert = function(folder / _GPTQMODEL_V1, "convert_gptq_v2_to_v1_format_module", log=quiet, torch=torch,
                           BaseQuantLinear=Layer)  # fmt: skip
        convert(layer, layer)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": ordered,
              "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}  # fmt: skip
    if is_new:
        config["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    return {"by": by, "config": config, "means": means(codes, scales, zeros, order),
            "stored": tensors(layer, "qweight", "qzeros", "scales", "g_idx")}  # fmt: skip


def main(folder: Path) -> None:
    torch.manual_seed(20261121)
    cases = [awq(folder, group) for group in (32, 64)]
    old, new = "AutoGPTQ 0.7.1", "GPTQModel 7.7.0"
    for bits, group, symmetric, ordered in ((4, 32, True, False), (4, 16, False, True), (8, 32, False, False)):
        cases.append(gptq(folder, old, bits, group, symmetric, ordered, 1))
        cases += [gptq(folder, new, bits, group, symmetric, ordered, version) for version in (1, 2)]
    PLACE.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
