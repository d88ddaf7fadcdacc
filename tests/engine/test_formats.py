"""Formats of quantised weights: each is read as its own writers and readers mean it, and nothing else is taken."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.errors import EngineError
from engine.weights.loading import load_weights
from engine.weights.quantisation import parse_quantisation
from kernels.packed import Packed, dequantise
from tests.engine.quantised import (
    AWQ,
    FORMATS,
    FP8,
    compressed,
    compressed_int8,
    config,
    gptq,
    gptq_config,
    load,
    ours,
    packed_config,
    plain,
    read,
)
from tests.engine.tiny import file_set

UPSTREAM = json.loads(Path(__file__).with_name("packed_by_upstream.json").read_text())


def decoded(given: dict[str, Any]) -> torch.Tensor:
    array = np.frombuffer(base64.b64decode(given["data"]), given["dtype"]).reshape(given["shape"])
    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("case", UPSTREAM, ids=lambda case: f"{case['by']} {list(case['config'].values())[1:6]}")
def test_what_upstream_packed_is_unpacked_to_the_last_bit(case: dict[str, Any]) -> None:
    codes, scales, zeros, order = (decoded(case["means"][name]) for name in ("codes", "scales", "zeros", "order"))
    stored = {name: decoded(tensor) for name, tensor in case["stored"].items()}
    wanted = (codes - zeros.float()[:, order.long()]) * scales[:, order.long()]
    assert torch.equal(plain(case["config"], stored, tuple(codes.shape)), wanted)


def scheme(kind: str, weights: dict[str, Any]) -> tuple[QuantizationScheme, dict[str, Any]]:
    """What the writer is told, and what it writes into config.json."""
    inputs = {"num_bits": 8, "type": weights["type"], "dynamic": True, "strategy": "token"}
    made = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=kind)
    group = json.loads(made.model_dump_json())
    return made, {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "global_compression_ratio": 1.5,
        "kv_cache_scheme": None,
    }


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")),
    bits=st.sampled_from((4, 8)),
    strategy=st.sampled_from(("group", "channel", "tensor", "block")),
    symmetric=st.booleans(),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 5), st.sampled_from((8, 16, 32))),
    seed=st.integers(0, 99),
)
def test_what_compressed_tensors_writes_is_read_as_it_reads_it_itself(
    kind: str, bits: int, strategy: str, symmetric: bool, sizes: tuple[int, int, int], seed: int
) -> None:
    out, groups, group = sizes
    out = (
        -(-out // 4) * 4 if strategy == "block" else out
    )  # its reader does not take a last block that is not whole
    inner = groups * group
    number = "float" if kind == "float-quantized" else "int"
    bits, symmetric = (8, True) if number == "float" else (bits, symmetric)
    if kind == "pack-quantized" and strategy in ("tensor", "block"):
        symmetric = True  # its own reader does not pack the others' zero points
    if kind == "pack-quantized" and not symmetric:
        out += 8  # nor can it view zero points that fill no more than one word
    weights: dict[str, Any] = {"num_bits": bits, "type": number, "symmetric": symmetric, "strategy": strategy}
    if strategy == "group":
        weights["group_size"] = group
    if strategy == "block":
        weights["block_structure"] = [4, group]
    made, config = scheme(kind, weights)
    generator = torch.Generator().manual_seed(seed)
    scales = {"group": (out, groups), "channel": (out, 1), "tensor": (1,), "block": (-(-out // 4), groups)}[
        strategy
    ]
    state = {
        "weight": torch.randn(out, inner, generator=generator),
        "weight_scale": torch.rand(scales, generator=generator) * 0.1 + 0.01,
    }
    if not symmetric:
        low = 2 ** (bits - 1)
        state["weight_zero_point"] = torch.randint(-low, low, scales, generator=generator).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(state, made)
    wanted = compressor.decompress(stored, made)["weight"]
    found = plain(config, stored, (out, inner))
    assert torch.allclose(found, wanted.float(), rtol=1e-6, atol=0)


@settings(max_examples=25, deadline=None)
@given(experts=st.integers(1, 3), out=st.integers(1, 12), blocks=st.integers(1, 4), seed=st.integers(0, 99))
def test_mxfp4_experts_are_those_of_transformers(experts: int, out: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (experts, out, blocks, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(90, 160, (experts, out, blocks), generator=generator, dtype=torch.uint8)
    tensors = {"experts.down_proj_blocks": codes, "experts.down_proj_scales": scales}
    weights = load({"quant_method": "mxfp4"}, tensors, {"experts.down_proj": (experts, 32 * blocks, out)})
    wanted = convert_moe_packed_tensors(codes, scales, dtype=torch.float32)
    found = weights.experts("experts.down_proj")
    assert weights.names == []
    for matrix, expert in zip(found, wanted, strict=True):
        assert isinstance(matrix, Packed)
        assert torch.equal(dequantise(matrix).T, expert)


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 40), inner=st.integers(1, 70), seed=st.integers(0, 99), exponents=st.booleans())
def test_blocks_of_fp8_are_those_of_transformers(out: int, inner: int, seed: int, exponents: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(out, inner, generator=generator).to(torch.float8_e4m3fn)
    grid = (-(-out // 16), -(-inner // 32))
    scales = torch.rand(grid, generator=generator)
    stored = scales
    if exponents:
        stored = torch.randint(100, 140, grid, generator=generator, dtype=torch.uint8)
        scales = 2.0 ** (stored.float() - 127)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}
    found = plain(config, {"weight": codes, "weight_scale_inv": stored}, (out, inner))
    assert torch.equal(found, _dequantize_fp8_weight(codes, scales, [16, 32], torch.float32))
    if out % 16 == 0 and inner % 32 == 0:
        assert torch.equal(found, Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=6, deadline=None)
@given(out=st.integers(1, 6), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_format_is_read_as_its_description_says(name: str, out: int, groups: int, seed: int) -> None:
    given_config, packer = FORMATS[name]
    shape = (8 * out, 32 * groups)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    quantised = packer(weight)
    assert torch.allclose(plain(given_config, quantised.tensors, shape), quantised.plain, rtol=1e-6, atol=0)


def test_int4_of_an_odd_number_of_inputs_is_read_to_the_last() -> None:
    weight = torch.randn(3, 7)
    quantised = ours(4, 0, False)(weight)
    given_config = config("cloister", bits=4, group_size=0, symmetric=False)
    assert torch.allclose(plain(given_config, quantised.tensors, (3, 7)), quantised.plain, rtol=1e-6)
    quantised.tensors["codes"][1, -1] |= 0x30
    with pytest.raises(
        EngineError, match="WEIGHTS_INVALID: the quantised layer has a code beyond its last column"
    ):
        plain(given_config, quantised.tensors, (3, 7))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("meta", [{}, {"meta": {"quantizer": ["gptqmodel:1.4.0"]}}], ids=["", "gptqmodel"])
def test_gptqs_words_may_have_room_for_more_outputs_than_there_are(symmetric: bool, meta: dict[str, Any]) -> None:
    quantised = gptq(4, 32, symmetric, False, 1)(torch.randn(12, 64))
    given_config = gptq_config(4, 32, symmetric, False, "gptq") | meta
    assert torch.allclose(plain(given_config, quantised.tensors, (12, 64)), quantised.plain, rtol=1e-6)


def test_inputs_that_name_their_groups_are_read_in_their_order() -> None:
    which = torch.tensor([(7 * i + 3) % 64 // 32 for i in range(64)], dtype=torch.int32)
    codes, scales = torch.randint(-8, 8, (8, 64)), torch.rand(8, 2)
    tensors = {
        "weight_packed": pack_to_int32(codes.to(torch.int8), 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor([8, 64]),
        "weight_g_idx": which,
    }
    found = plain(packed_config(4, 32, True, actorder="group"), tensors, (8, 64))
    assert torch.equal(found, codes * scales[:, which.long()])


SPOILED = [
    ("awq g32", "scales", float("nan"), "a scale that is not a finite number"),
    ("gptq", "scales", float("inf"), "a scale that is not a finite number"),
    ("int4 g32 (ours)", "scales", float("inf"), "a scale that is not a finite number"),
    ("int4 g128, zeros (ours)", "zeros", float("nan"), "a scale that is not a finite number"),
    ("compressed int4", "weight_scale", float("nan"), "a scale that is not a finite number"),
    ("compressed fp8", "weight", float("nan"), "a code that is no number"),
    ("fp8 blocks", "weight", float("nan"), "a code that is no number"),
    ("fp8 blocks", "weight_scale_inv", float("-inf"), "a scale that is not a finite number"),
    ("gptq act-order", "g_idx", 9, "does not have 32 inputs in every group"),
    ("gptq act-order", "g_idx", -1, "does not have 32 inputs in every group"),
    ("gptq", "g_idx", 1, "does not have 32 inputs in every group"),
    ("gptq", "qzeros", 0x12345678, "not all its zero points are 8"),
    ("gptq act-order", "qzeros", 0x1111111F, "a zero point that loaders of version 1 do not agree on"),
    ("compressed int4", "weight_shape", 3, "says it has the shape"),
]


@pytest.mark.parametrize(("name", "tensor", "value", "said"), SPOILED, ids=str)
def test_codes_and_scales_no_sound_file_has_are_refused(name: str, tensor: str, value: float, said: str) -> None:
    given_config, packer = FORMATS[name]
    tensors = packer(torch.randn(16, 64)).tensors
    tensors[tensor].flatten()[0] = value
    with pytest.raises(EngineError, match=f"the quantised layer .*{said}") as error:
        read(given_config, tensors, (16, 64))
    assert error.value.code == "WEIGHTS_INVALID"


def test_inputs_out_of_order_that_the_config_denies_are_refused() -> None:
    tensors = gptq(4, 32, True, True, 1)(torch.randn(16, 64)).tensors
    with pytest.raises(EngineError, match=r"WEIGHTS_INVALID: .*out of order, which its config denies"):
        read(gptq_config(4, 32, True, False, "gptq"), tensors, (16, 64))


def test_int4_codes_beyond_their_bits_are_refused() -> None:
    tensors = {"weight": torch.full((4, 8), 9, dtype=torch.int8), "weight_scale": torch.ones(4, 1)}
    with pytest.raises(EngineError, match=r"WEIGHTS_INVALID: .*a code beyond 4 bits"):
        read(packed_config(4, 0, True, "int-quantized"), tensors, (4, 8))


def test_a_bias_the_model_does_not_have_is_taken_only_where_it_is_nothing() -> None:
    for name in ("awq g32", "gptq"):
        given_config, packer = FORMATS[name]
        tensors = packer(torch.randn(16, 64)).tensors | {"bias": torch.zeros(16).half()}
        read(given_config, tensors, (16, 64))
        tensors["bias"][3] = 1
        with pytest.raises(EngineError, match=r"WEIGHTS_INVALID: .* has a bias, which its model does not have"):
            read(given_config, tensors, (16, 64))


def test_a_bias_the_model_has_stays_the_models() -> None:
    given_config, packer = FORMATS["awq g32"]
    tensors = packer(torch.randn(16, 64)).tensors | {"bias": torch.ones(16).half()}
    named = {f"layer.{name}": tensor for name, tensor in tensors.items()}
    weights = load(given_config, named, {"layer.weight": (16, 64), "layer.bias": (16,)})
    weights.matrix("layer")
    assert weights.names == ["layer.bias"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_must_be_there_once_with_its_shape_and_number_type(name: str) -> None:
    given_config, packer = FORMATS[name]
    tensors = packer(torch.randn(16, 64)).tensors
    optional = {"g_idx"} if "act-order" not in name else set()
    for key, tensor in tensors.items():
        wrong = [tensor.new_zeros((*tensor.shape, 2)), tensor[..., :0] if tensor.dim() else tensor.new_zeros(3)]
        for changed in wrong:
            with pytest.raises(EngineError) as error:
                read(given_config, tensors | {key: changed}, (16, 64))
            assert (error.value.code, f"layer.{key}" in error.value.message) == ("TENSORS_MISMATCH", True)
        if key not in optional:
            rest = {left: value for left, value in tensors.items() if left != key}
            with pytest.raises(EngineError) as error:
                read(given_config, rest, (16, 64))
            assert error.value.code in ("TENSORS_MISMATCH", "DTYPE_UNSUPPORTED")
    for key in ("weight_zero_point", "qzeros", "weight_g_idx", "scales", "anything"):
        if key not in tensors:
            with pytest.raises(EngineError, match=rf"tensor layer\.{key} ") as error:
                read(given_config, tensors | {key: torch.zeros(2, 2)}, (16, 64))
            assert error.value.code == "TENSORS_MISMATCH"


def test_a_group_larger_than_the_inputs_is_one_group_and_no_more() -> None:
    quantised = ours(4, 0, True)(torch.randn(8, 64))
    given_config = config("cloister", bits=4, group_size=128, symmetric=True)
    assert torch.allclose(plain(given_config, quantised.tensors, (8, 64)), quantised.plain, rtol=1e-6)
    two = quantised.tensors | {"scales": torch.ones(8, 2)}
    with pytest.raises(EngineError, match=r"TENSORS_MISMATCH: tensor layer\.scales is F32 \[8, 2\], wanted"):
        read(given_config, two, (8, 64))


@pytest.mark.parametrize(
    "given_config", [{"quant_method": "mxfp4"}, AWQ, FP8], ids=lambda given: given["quant_method"]
)
def test_a_format_of_matrices_is_none_of_stacks_nor_the_other_way_round(given_config: dict[str, Any]) -> None:
    shapes = {"experts.down_proj": (2, 32, 8), "layer.weight": (8, 32)}
    tensors = {"experts.down_proj": torch.zeros(2, 32, 8), "layer.weight": torch.zeros(8, 32)}
    assert load(given_config, tensors, shapes).names == ["experts.down_proj", "layer.weight"]
    for name in shapes:
        with pytest.raises(EngineError, match=rf"TENSORS_MISMATCH: tensor {name} is missing"):
            load(given_config, {other: tensor for other, tensor in tensors.items() if other != name}, shapes)
        with pytest.raises(EngineError, match=rf"(DTYPE_UNSUPPORTED|TENSORS_MISMATCH): tensor {name}.* is "):
            load(given_config, tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, shapes)


def test_scales_that_are_stored_as_exponents_are_read_from_files(tmp_path: Path) -> None:
    scales = 2.0 ** torch.tensor([[3, -4]])
    codes = torch.randn(16, 64).to(torch.float8_e4m3fn)
    stored = {"layer.weight": codes, "layer.weight_scale_inv": scales.to(torch.float8_e8m0fnu)}
    save_file(stored, tmp_path / "model.safetensors")
    known = parse_quantisation({"quantization_config": FORMATS["fp8 blocks"][0]})
    weights = load_weights(*file_set(tmp_path), {"layer.weight": (16, 64)}, ("layer.weight",), known)
    assert torch.equal(dequantise(weights.matrix("layer")), codes.float() * scales.repeat_interleave(32, 1))
    assert weights.names == []


def test_plain_and_quantised_matrices_stand_side_by_side() -> None:
    given_config, packer = FORMATS["gptq"]
    named = {f"a.{name}": tensor for name, tensor in packer(torch.randn(16, 64)).tensors.items()}
    weights = load(
        given_config, named | {"b.weight": torch.ones(3, 4)}, {"a.weight": (16, 64), "b.weight": (3, 4)}
    )
    assert isinstance(weights.matrix("a"), Packed)
    assert torch.equal(weights.matrix("b"), torch.ones(3, 4))


def test_of_several_groups_of_layers_the_files_tell_which_each_is() -> None:
    both = packed_config(4, 32, True)
    both["config_groups"]["group_1"] = packed_config(8, 0, True, "int-quantized")["config_groups"]["group_0"]
    both["config_groups"]["group_1"]["format"] = "int-quantized"
    both["format"] = "mixed-precision"
    both["config_groups"]["group_0"]["format"] = "pack-quantized"
    first, second = compressed(4, 32, True)(torch.randn(8, 64)), compressed_int8(torch.randn(8, 64))
    assert torch.allclose(plain(both, first.tensors, (8, 64)), first.plain, rtol=1e-6)
    assert torch.allclose(plain(both, second.tensors, (8, 64)), second.plain, rtol=1e-6)


def objects(value: Any, where: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all objects in a configuration, but what holds the groups by names anybody may choose."""
    inside = [
        path for key, inner in value.items() if isinstance(inner, dict) for path in objects(inner, (*where, key))
    ]
    return inside if where[-1:] == ("config_groups",) else [where, *inside]


def changed(value: dict[str, Any], path: tuple[str, ...], key: str, to: object) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(value))
    place = copied
    for step in path:
        place = place[step]
    place[key] = to
    return copied


def refusal(value: dict[str, Any]) -> EngineError:
    with pytest.raises(EngineError) as error:
        parse_quantisation({"quantization_config": value})
    assert error.value.code == "QUANTISATION_UNSUPPORTED"
    return error.value


@pytest.mark.parametrize("name", FORMATS)
def test_every_field_that_says_what_the_numbers_are_is_read_and_every_other_refused_by_name(name: str) -> None:
    given_config, _ = FORMATS[name]
    assert parse_quantisation({"quantization_config": given_config}) is not None
    assert parse_quantisation({"compression_config": given_config, "quantization_config": None}) is not None
    for path in objects(given_config):
        assert "surprise" in refusal(changed(given_config, path, "surprise", 1)).message
        assert parse_quantisation({"quantization_config": changed(given_config, path, "surprise", None)})
        place = given_config
        for step in path:
            place = place[step]
        for key in place.keys() - {"targets"}:
            message = refusal(changed(given_config, path, key, "strange")).message
            assert key in message
            assert "strange" in message


W4 = FORMATS["compressed int4"][0]
W8 = FORMATS["compressed w8a8"][0]
GROUP = ("config_groups", "group_0")
GPTQ = FORMATS["gptq"][0]
OURS = FORMATS["int4 g32, embeddings too (ours)"][0]
UNSUPPORTED = [
    (OURS, ("embeddings",), "bits", 2),
    (OURS, ("embeddings",), "group_size", -1),
    (OURS, (), "embeddings", []),
    (AWQ, (), "embeddings", OURS["embeddings"]),
    ({"quant_method": "bitsandbytes"}, (), "quant_method", "bitsandbytes"),
    (AWQ, (), "bits", 8),
    (AWQ, (), "zero_point", False),
    (AWQ, (), "version", "gemv"),
    (AWQ, (), "desc_act", True),
    (AWQ, (), "group_size", 0),
    (GPTQ, (), "bits", 3),
    (GPTQ, (), "bits", True),
    (GPTQ, (), "group_size", 0),
    (GPTQ, (), "checkpoint_format", "marlin"),
    (GPTQ, (), "dynamic", {"+:.*": {"bits": 8}}),
    (GPTQ, (), "is_marlin_format", True),
    (FP8, (), "fmt", "e5m2"),
    (FP8, (), "expert_dtype", "fp4"),
    (FP8, (), "weight_block_size", [128]),
    (FP8, (), "kv_cache_scheme", {"num_bits": 8}),
    (W4, (), "format", "nvfp4-pack-quantized"),
    (W4, (), "quantization_status", "calibration"),
    (W4, (), "kv_cache_scheme", {"num_bits": 8}),
    (W4, (), "transform_config", {"config_groups": {"R1": {}}}),
    (W4, (), "config_groups", {}),
    (W4, (), "config_groups", {str(i): W4["config_groups"]["group_0"] for i in range(65)}),
    (W4, (), "sparsity_config", {"format": "sparse-24-bitmask"}),
    (W4, GROUP, "output_activations", {"num_bits": 8}),
    (W4, GROUP, "input_activations", {"num_bits": 4}),
    (W4, (*GROUP, "weights"), "num_bits", 3),
    (W4, (*GROUP, "weights"), "type", "float"),
    (W4, (*GROUP, "weights"), "dynamic", True),
    (W4, (*GROUP, "weights"), "group_size", 0),
    (W4, (*GROUP, "weights"), "strategy", "tensor_group"),
    (W8, (*GROUP, "weights"), "block_structure", [16, 16]),
]


@pytest.mark.parametrize(("given_config", "path", "key", "value"), UNSUPPORTED, ids=str)
def test_what_this_engine_does_not_compute_is_refused_by_name(
    given_config: dict[str, Any], path: tuple[str, ...], key: str, value: object
) -> None:
    assert key in refusal(changed(given_config, path, key, value)).message


def test_two_accounts_of_quantisation_are_one_too_many() -> None:
    with pytest.raises(EngineError, match=r"QUANTISATION_UNSUPPORTED: .*compression_config beside it"):
        parse_quantisation({"quantization_config": AWQ, "compression_config": AWQ})
    assert parse_quantisation({"quantization_config": None}) is None
    assert parse_quantisation({}) is None
    assert "object" in refusal([1]).message  # type: ignore[arg-type]  # what a file may hold


def test_inputs_of_eight_bits_may_stay_as_they_are_and_their_scales_are_not_missed() -> None:
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor"}
    static = changed(W8, GROUP, "input_activations", inputs)
    quantised = compressed_int8(torch.randn(8, 64))
    for extra in ({}, {"input_scale": torch.ones(1)}, {"input_scale": torch.tensor(0.5).bfloat16()}):
        found = plain(static, quantised.tensors | extra, (8, 64))
        assert torch.allclose(found, quantised.plain, rtol=1e-6)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(FORMATS)), value=ANYTHING, data=st.data())
def test_whatever_a_field_holds_it_is_read_or_refused(name: str, value: object, data: st.DataObject) -> None:
    given_config, _ = FORMATS[name]
    path = data.draw(st.sampled_from(objects(given_config)))
    place = given_config
    for step in path:
        place = place[step]
    key = data.draw(st.sampled_from(sorted(place)))
    copied = changed(given_config, path, key, None)
    inside = copied
    for step in path:
        inside = inside[step]
    inside[key] = value
    refused = None
    try:
        parse_quantisation({"quantization_config": copied})
    except EngineError as error:
        refused = error.code
    assert refused in (None, "QUANTISATION_UNSUPPORTED")
