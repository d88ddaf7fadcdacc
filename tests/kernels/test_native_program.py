"""The native backend: what it keeps and how much, and whole steps that have the bits of their ops one by one."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.native import layout
from kernels.native.backend import NativeBackend
from kernels.native.library import ClKv
from kernels.native.location import find_library
from kernels.native.nodes import BF16, F32
from kernels.native.program import forms_of, names, plan, record
from kernels.native.weights import PackedMatrix
from kernels.ops import Attending, Heads, KvSpec, Rows
from kernels.packed import Packed, dequantise
from kernels.packed_cpu import layout_of
from kernels.steps import StepLimits
from tests.kernels.test_packed import KINDS, matrix
from tests.kernels.textbook import noise

pytestmark = pytest.mark.skipif(find_library() is None, reason="there is no native library to test")
DTYPES = (torch.float32, torch.bfloat16)
HIDDEN, INNER, HEADS, VOCABULARY = 48, 70, Heads(4, 2, 10), 37
LIMITS = StepLimits(tokens=40, rows=3, context=64)


def tensors(packed: PackedMatrix) -> list[Tensor]:
    return [t for t in (packed.weights, packed.scales, packed.zeros, packed.table, packed.order) if t is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("out", "inner", "columns"), [(16, 64, 32), (33, 100, 32), (7, 5, 128), (40, 65, 5)])
def test_bytes_of_a_matrix_are_told_before_it_is_read(
    kind: str, out: int, inner: int, columns: int, dtype: torch.dtype
) -> None:
    ops = NativeBackend(dtype)
    given = matrix(kind, out, inner, rows=3, columns=columns, ordered=out == 33)
    form = layout.choose(layout_of(given), inner, dtype.itemsize)
    packed = ops.prepare_linear([given]).parts[0]
    assert packed.form == form
    assert sum(t.nbytes for t in tensors(packed)) == layout.matrix_bytes(form, out, inner)
    assert (
        len(packed.weights) == layout.packed_bytes(form, out, inner) == ops.library.packed_bytes(packed.struct())
    )
    plain = ops.prepare_table(noise(out, inner))
    assert len(plain.weights) == layout.matrix_bytes(layout.choose(None, inner, dtype.itemsize), out, inner)


@pytest.mark.parametrize("kv_dtype", layout.KV_TYPES)
def test_bytes_of_a_page_are_told_without_the_library(kv_dtype: str) -> None:
    ops = NativeBackend(kv_dtype=kv_dtype)
    for block_size, heads, dim in ((16, 2, 64), (1, 1, 8), (24, 3, 80), (1024, 1, 512), (7, 5, 33)):
        kind = layout.KV_TYPES[kv_dtype]
        expected = layout.kv_page_bytes(kind, block_size, heads, dim)
        assert ops.library.kv_page_bytes(ClKv(kind, 0, 3, 4, block_size, heads, dim, None)) == expected
        assert ops.allocate_kv(KvSpec(3, 4, block_size, heads, dim)).pages.shape == (3, 4, expected)


@pytest.mark.parametrize("ordered", [False, True], ids=["as it is", "in an order of its own"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_packed_table_are_the_numbers_it_stands_for(kind: str, ordered: bool) -> None:
    given, ids = matrix(kind, 40, 64, 1, 32, ordered), [0, 39, 17, 15, 16, 17]
    rows = Rows(ids, [0], [len(ids)], [(0, 1)])
    for dtype, rounding in ((torch.float32, 0.0), (torch.bfloat16, 2.0**-10)):  # of scales and zeros, in bfloat16
        ops = NativeBackend(dtype)
        batch = ops.begin(rows, ops.allocate_kv(KvSpec(1, 2, 4, 1, 8)))
        found, expected = ops.embed(batch, ops.prepare_table(given)), dequantise(given)[ids]
        shift = 0.0 if given.zeros is None else float((given.zeros * given.scales).abs().max())
        assert ((found - expected).abs() <= rounding * (expected.abs() + shift)).all()


def test_scales_beyond_the_range_of_16_bits_keep_32() -> None:
    given, ops = matrix("int4", 16, 64, 1, 32), NativeBackend(torch.bfloat16)
    assert ops.prepare_table(given).form.scale_type == layout.FLOAT16
    given.scales[3, 1] = 1e-20
    assert ops.prepare_table(given).form.scale_type == layout.FLOAT32
    far = matrix("int4 zeros", 16, 64, 1, 32)
    assert far.zeros is not None
    far.zeros[0, 0] = 1e6
    assert ops.prepare_table(far).form.scale_type == layout.FLOAT32


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_comes_out_of_its_output_alone(fault: float) -> None:
    given, ops = matrix("int4", 16, 64, 1, 32), NativeBackend(torch.bfloat16)
    given.scales[3, 1] = fault
    before = ops.library.isa
    try:
        for isa in ops.library.isas:
            ops.library.select(isa)
            finite = ops.linear(noise(2, 64), ops.prepare_linear([given])).isfinite().all(0)
            assert finite.tolist() == [output != 3 for output in range(16)], isa
    finally:
        ops.library.select(before)


@pytest.mark.parametrize("kind", ["int8", "int8 zeros"])
def test_inputs_too_many_for_sums_of_32_bits_are_multiplied_as_numbers(kind: str) -> None:
    ops = NativeBackend(torch.bfloat16)
    for inner, form in ((2**16, layout.W8A8), (2**16 + 4096, layout.DECODED)):
        given = matrix(kind, 16, inner, 1, inner)
        given.codes.fill_(255 if given.zeros is not None else -128)
        linear = ops.prepare_linear([given])
        assert linear.parts[0].form.kind == form
        right = dequantise(given).double().sum(1)
        found = ops.linear(torch.ones(1, inner), linear)[0]
        torch.testing.assert_close(found.double(), right, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stacked_matrices_are_one_where_they_can_be_and_answer_as_each_alone(dtype: torch.dtype) -> None:
    ops, x = NativeBackend(dtype), noise(5, 64, seed=9)
    alike = [matrix("int4", 32, 64, 1, 32, seed=i) for i in range(3)]
    table = matrix("table", 16, 64, 1, 32)
    stacks: list[tuple[Sequence[Packed | Tensor], int]] = [
        (alike, 1),
        ([alike[0], matrix("int4", 7, 64, 1, 32), alike[1]], 2),  # a tile must not hold rows of two
        ([alike[0], alike[1]._replace(order=torch.randperm(64)), alike[2]], 3),
        ([alike[0], noise(16, 64), noise(16, 64, seed=1), alike[1]], 3),
        ([table, table, matrix("float8", 16, 64, 1, 32)], 3),
    ]
    for stack, parts in stacks:
        together = ops.prepare_linear(stack)
        assert len(together.parts) == parts
        alone = [ops.linear(x, ops.prepare_linear([one])) for one in stack]
        assert torch.equal(ops.linear(x, together), torch.cat(alone, -1))  # factors are powers of two
    tiny = alike[1]._replace(scales=alike[1].scales * 2.0**-40)
    last = ops.linear(x, ops.prepare_linear([alike[0], tiny]))[:, 32:]
    assert torch.equal(last, ops.linear(x, ops.prepare_linear([tiny])))
    assert last.any()


class Toy(NamedTuple):
    """Two layers in the way of a decoder; embeddings and head are one table."""

    table: Any
    head: Any
    layers: list[dict[str, Any]]
    norm: Any
    rope: Any

    def __call__(self, ops: Any, kv: Any, batch: Any) -> Any:
        residual = ops.embed(batch, self.table, 3.0)
        x = ops.rms_norm(residual, self.norm, 1e-5)
        for i, layer in enumerate(self.layers):
            q = ops.rope_and_write_kv(ops.linear(x, layer["qkv"]), HEADS, self.rope, kv, i, batch)
            x = ops.linear(ops.paged_attention(q, HEADS, Attending(0.3), kv, i, batch), layer["out"])
            x, residual = ops.add_rms_norm(x, residual, self.norm, 1e-5)
            x = ops.linear(ops.gated(ops.linear(x, layer["up"]), "silu"), layer["down"])
            x, residual = ops.add_rms_norm(x, residual, self.norm, 1e-5, 0.5)
        return x

    def logits(self, ops: Any, hidden: Any, tokens: Sequence[int]) -> Any:
        return ops.logits(hidden, self.head, tokens, 0.5, 3.0)


def toy(ops: NativeBackend) -> Toy:
    def weight(out: int, inner: int, kind: str = "int4", seed: int = 0) -> Any:
        return matrix(kind, out, inner, 1, 32, seed=seed)

    width = (HEADS.query + 2 * HEADS.kv) * HEADS.dim
    biases = [noise(width - 9), noise(9)]
    layers = [
        {
            "qkv": ops.prepare_linear([weight(width - 9, HIDDEN, "int8", i), noise(9, HIDDEN)], biases),
            "out": ops.prepare_linear([weight(HIDDEN, HEADS.query * HEADS.dim, "float8")]),
            "up": ops.prepare_linear([weight(INNER, HIDDEN), weight(INNER, HIDDEN, "table", i)]),
            "down": ops.prepare_linear([weight(HIDDEN, INNER, "int4 zeros")]),
        }
        for i in range(2)
    ]
    rope = ops.prepare_rope([1.0, 0.3, 0.05], 64)
    table = ops.prepare_table(weight(VOCABULARY, HIDDEN))
    return Toy(table, ops.tied_head(table), layers, ops.prepare_vector(noise(HIDDEN)), rope)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dtype", "kv_dtype"), [(torch.float32, "bfloat16"), (torch.bfloat16, "int8")], ids=str)
def test_a_step_at_once_has_the_bits_of_its_ops_one_by_one(
    dtype: torch.dtype, kv_dtype: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    ops = NativeBackend(dtype, kv_dtype)
    model, spec = toy(ops), KvSpec(2, 9, 8, HEADS.kv, HEADS.dim)
    own, other, third = ops.allocate_kv(spec), ops.allocate_kv(spec), ops.allocate_kv(spec)
    picking = ops.compile(model, third, LIMITS)
    step = ops.compile(model, own, LIMITS)
    steps = [
        (Rows(list(range(33)), [0, 0], [20, 13], [(3, 1, 8), (2, 7)]), [19, 32]),
        (Rows([5, 6, 7], [20, 13, 0], [1, 1, 1], [(3, 1, 8), (2, 7), (0,)]), [2, 0]),
        (Rows([8] * 10, [21], [10], [(3, 1, 8, 4)]), []),
    ]
    for rows, picked in steps:
        hidden, logits = step(rows, picked)
        expected = model(ops, other, ops.begin(rows, other))
        assert torch.equal(hidden, expected)
        assert torch.equal(logits, model.logits(ops, expected, picked))
        assert torch.equal(own.pages, other.pages)
        assert torch.equal(picking(rows, picked, whole=False)[1], logits)
        assert torch.equal(third.pages, other.pages)
    with pytest.raises(ValueError, match="41 tokens in 1 rows"):
        step(Rows([1] * 41, [0], [41], [(0, 1, 2, 3, 4, 5)]), [])
    with pytest.raises(ValueError, match="of which the longest holds 65"):
        step(Rows([1], [64], [1], [tuple(range(9))]), [])


class SideBySide(NamedTuple):
    """A layer whose MLP reads what its attention reads."""

    toy: Toy

    def __call__(self, ops: Any, kv: Any, batch: Any) -> Any:
        layer, residual = self.toy.layers[0], ops.embed(batch, self.toy.table, 3.0)
        x = ops.rms_norm(residual, self.toy.norm, 1e-5)
        q = ops.rope_and_write_kv(ops.linear(x, layer["qkv"]), HEADS, self.toy.rope, kv, 0, batch)
        attended = ops.linear(ops.paged_attention(q, HEADS, Attending(0.3), kv, 0, batch), layer["out"])
        inner = ops.linear(ops.gated(ops.linear(x, layer["up"]), "silu"), layer["down"])
        return ops.add(ops.add(attended, inner), residual)

    def logits(self, ops: Any, hidden: Any, tokens: Sequence[int]) -> Any:
        return ops.logits(hidden, self.toy.head, tokens)


def test_rows_that_nobody_picks_end_with_the_last_attention() -> None:
    ops = NativeBackend()
    deep, flat = (ops.allocate_kv(KvSpec(layers, 9, 8, HEADS.kv, HEADS.dim)) for layers in (2, 1))
    found = record(toy(ops), deep, torch.float32, whole=False)
    assert names(node.code for node in found.nodes[found.tail :]) == [
        *("linear", "pick", "norm", "linear", "gated", "linear", "norm", "linear", "cap"),
    ]
    model, rows = SideBySide(toy(ops)), Rows(list(range(30)), [0, 0], [20, 10], [(3, 1, 8), (2, 7)])
    side = record(model, flat, torch.float32, whole=False)
    assert names(node.code for node in side.nodes[side.tail :]) == ["linear"]
    _, logits = ops.compile(model, flat, LIMITS)(rows, [19, 29], whole=False)
    expected = model.logits(ops, model(ops, flat, ops.begin(rows, flat)), [19, 29])
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("token", [VOCABULARY, -1, 2**31 - 1])
def test_a_token_that_the_table_lacks_is_a_fault_of_its_own_row_alone(token: int) -> None:
    ops = NativeBackend()
    step = ops.compile(toy(ops), ops.allocate_kv(KvSpec(2, 9, 8, HEADS.kv, HEADS.dim)), LIMITS)
    _, logits = step(Rows([1, 2], [0, 0], [1, 1], [(0,), (1,)]), [0, 1])
    expected = logits[0].clone()
    _, logits = step(Rows([1, token], [0, 0], [1, 1], [(0,), (1,)]), [0, 1])
    assert torch.equal(logits[0], expected)
    assert logits[1].isnan().all()


def test_values_that_live_at_once_have_places_of_their_own_and_only_forms_that_are_read() -> None:
    ops = NativeBackend(torch.bfloat16)
    recording = record(toy(ops), ops.allocate_kv(KvSpec(2, 9, 8, HEADS.kv, HEADS.dim)), torch.bfloat16)
    found, nodes = plan(recording, LIMITS), recording.nodes
    first = {value: i for i, node in reversed([*enumerate(nodes)]) for value in (*node.plain, node.makes) if value}
    last = {value: i for i, node in enumerate(nodes) for value, _ in node.reads}
    last |= {recording.hidden: len(nodes), recording.logits: len(nodes)}
    replaced = {(node.replaces, node.plain[-1]) for node in nodes if node.replaces and node.plain}
    for one, two in combinations(found.places, 2):
        together = first[one] <= last[two] and first[two] <= last[one]
        if together and (one, two) not in replaced and (two, one) not in replaced:
            spans = sorted((found.places[v], found.places[v] + found.parts[v].size) for v in (one, two))
            assert spans[0][1] <= spans[1][0]
    assert found.size < sum(found.parts[value].size for value in found.places) / 3
    int8 = layout.RowForm(layout.INT8, layout.SCALED)
    written = [found.forms[node.makes] for node in nodes if node.makes and node.makes in found.forms]
    assert written[1:5] == [{int8, BF16}, {BF16}, {int8, BF16}, {int8}]  # norm, attention, norm, gate
    assert F32 in written[-2]  # what the last norm makes is picked from
    assert forms_of(recording)[recording.logits] == {F32}
