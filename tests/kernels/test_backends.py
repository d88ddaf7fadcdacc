"""Both backends compute the textbook equations: compared op by op with float64 written out here."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.cpu import CpuBackend
from kernels.ops import ACTIVATIONS, Attending, Backend, Heads, KvSpec, Rows
from kernels.packed import Packed
from kernels.reference import ReferenceBackend
from tests.kernels.textbook import BACKENDS, Layer, Pages, Piece, attend, close, held, noise, padded

backends = pytest.mark.parametrize("ops", BACKENDS.values(), ids=BACKENDS.keys())
SPEC = KvSpec(num_layers=2, num_blocks=40, block_size=4, num_kv_heads=2, head_dim=8)


@backends
def test_a_linear_stacks_its_matrices_and_adds_their_biases(ops: Backend) -> None:
    x, first, second = noise(16, 12), noise(5, 12, seed=1), noise(7, 12, seed=2)
    weight = ops.prepare_linear([first, second], [noise(5, seed=3), noise(7, seed=4)])
    expected = torch.cat([x @ first.T + noise(5, seed=3), x @ second.T + noise(7, seed=4)], -1)
    close(ops.linear(padded(ops, x), weight), expected)


@backends
def test_a_quantised_matrix_is_the_plain_one_it_stands_for_beside_others(ops: Backend) -> None:
    codes = torch.randint(0, 16, (6, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scales, zeros = noise(3, 3, seed=2), torch.tensor([[8.0, 7.0, 1.0]] * 3)
    packed = Packed(codes, scales, rows=2, columns=4, bits=4, zeros=zeros)
    plain = torch.empty(6, 12, dtype=torch.float64)
    for i in range(6):
        for j in range(12):
            plain[i, j] = (float(codes[i, j]) - float(zeros[i // 2, j // 4])) * float(scales[i // 2, j // 4])
    x, other = noise(16, 12, seed=3), noise(5, 12, seed=4)
    weight = ops.prepare_linear([other, packed], [noise(5, seed=5), noise(6, seed=6)])
    expected = [x.double() @ other.double().T + noise(5, seed=5), x.double() @ plain.T + noise(6, seed=6)]
    close(ops.linear(padded(ops, x), weight), torch.cat(expected, -1))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@backends
def test_norms_divide_by_the_root_of_the_mean_square(ops: Backend) -> None:
    x, residual, weight = noise(16, 24), noise(16, 24, seed=1), noise(24, seed=2)
    prepared = ops.prepare_vector(weight)
    close(ops.rms_norm(padded(ops, x), prepared, 1e-5), norm(x, weight))
    for scale in (1.0, 0.22):
        normed, total = ops.add_rms_norm(padded(ops, x), padded(ops, residual), prepared, 1e-5, scale)
        close(normed, norm(x * scale + residual, weight))
        close(total, x * scale + residual)
        close(ops.add(padded(ops, x), padded(ops, residual), scale), x * scale + residual)


@pytest.mark.parametrize("backend", [ReferenceBackend, CpuBackend])
def test_the_offset_of_a_norm_is_added_before_its_weight_is_rounded(
    backend: Callable[[torch.dtype], Backend],
) -> None:
    ops, weight = backend(torch.bfloat16), noise(24).bfloat16() * 0.01  # 1 + weight has not the bits for this
    x = noise(16, 24, seed=1).bfloat16()
    answer = ops.rms_norm(x, ops.prepare_vector(weight, 1.0), 1e-5)
    assert answer.dtype == torch.bfloat16
    assert torch.equal(answer, norm(x, weight.double() + 1).bfloat16())
    assert not torch.equal(answer, norm(x, (weight + 1).double()).bfloat16())


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: gate * torch.sigmoid(gate) * up,
    "gelu": lambda gate, up: gelu(gate) * up,
    "gelu_tanh": lambda gate, up: gelu_tanh(gate) * up,
    "clamped_swiglu": lambda gate, up: (
        torch.minimum(gate, torch.tensor(7.0))
        * torch.sigmoid(1.702 * torch.minimum(gate, torch.tensor(7.0)))
        * (torch.clip(up, -7, 7) + 1)
    ),
}


@backends
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gate_comes_first_and_goes_through_its_activation(ops: Backend, activation: str) -> None:
    gate, up = noise(16, 10) * 5, noise(16, 10, seed=1) * 5
    close(
        ops.gated(padded(ops, torch.cat([gate, up], -1)), activation),
        GATES[activation](gate.double(), up.double()),
    )


@backends
def test_embeddings_and_logits_pick_the_rows_they_should(ops: Backend) -> None:
    table = noise(20, 6)
    rows = Rows([3, 4, 5, 19, 7], [0, 9, 0], [3, 1, 1], [(0,), (1, 2, 3), (4,)])
    batch = ops.begin(rows, ops.allocate_kv(SPEC))
    x = ops.embed(batch, ops.prepare_table(table))
    close(x[:5], table[[3, 4, 5, 19, 7]])
    head = ops.prepare_linear([table])
    close(ops.logits(x, head, [2, 4]), table[[5, 7]] @ table.T)
    close(ops.logits(x, head, [4, 0, 1, 4]), table[[7, 3, 4, 7]] @ table.T)


@pytest.mark.parametrize(
    "ops", [CpuBackend(torch.bfloat16), ReferenceBackend(torch.bfloat16)], ids=["cpu", "reference"]
)
def test_a_factor_of_embeddings_is_rounded_first_as_gemma_was_trained(ops: Backend) -> None:
    table, rounded = noise(50, 64), 59.75  # what 3584 ** 0.5, 59.867, is in bfloat16: Gemma 2 9B
    kv = ops.allocate_kv(SPEC)
    batch = ops.begin(Rows(list(range(16)), [0], [16], [[0, 1, 2, 3]]), kv)
    found = ops.embed(batch, ops.prepare_table(table), 3584**0.5)
    assert torch.equal(found, table.bfloat16()[:16] * rounded)


@backends
def test_embeddings_and_logits_are_scaled_and_logits_bounded(ops: Backend) -> None:
    table = noise(20, 6)
    batch = ops.begin(Rows([3, 19], [0, 0], [1, 1], [(0,), (1,)]), ops.allocate_kv(SPEC))
    x = ops.embed(batch, ops.prepare_table(table), 12.5)
    close(x[:2], table[[3, 19]] * 12.5)
    head, wide = ops.prepare_linear([table]), (table[[3, 19]] * 12.5).double() @ table.T.double()
    close(ops.logits(x, head, [0, 1], scale=0.125), wide * 0.125)
    close(ops.logits(x, head, [0, 1], softcap=30.0), 30 * torch.tanh(wide / 30))
    close(ops.logits(x, head, [0, 1], 0.125, 3.0), 3 * torch.tanh(wide * 0.125 / 3))


@backends
def test_what_a_former_owner_left_in_a_page_reaches_nobody(ops: Backend) -> None:
    layer = Layer(Heads(6, 2, 8), (1.0, 0.3, 0.05, 0.004), Attending(8**-0.5))
    sequence = noise(6, layer.width)
    pages = Pages(ops, layer, [sequence], block_size=4)
    assert torch.isnan(held(pages.kv)).any()
    (answer,) = pages.step([Piece(0, 0, 6)])
    close(answer, attend(sequence, layer))


@backends
def test_a_scrubbed_page_is_zero_in_every_layer_and_its_neighbours_are_not(ops: Backend) -> None:
    kv = ops.allocate_kv(SPEC)
    pages = held(kv)
    pages.fill_(1)
    ops.scrub(kv, [3, 5])
    assert pages[:, :, [3, 5]].abs().sum() == 0
    assert (pages[:, :, [2, 4, 6]] == 1).all()
