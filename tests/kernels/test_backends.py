"""Both backends compute the textbook equations: compared op by op, and with float64 written out here."""

import pytest
import torch
from torch import Tensor

from kernels.cpu import CpuBackend
from kernels.ops import Attending, Backend, Heads, KvSpec, Rows
from kernels.reference import ReferenceBackend

BACKENDS: dict[str, Backend] = {
    "reference": ReferenceBackend(),
    "reference, float64": ReferenceBackend(torch.float64),
    "cpu": CpuBackend(),
    "cpu, deterministic": CpuBackend(deterministic=True),
}
backends = pytest.mark.parametrize("ops", BACKENDS.values(), ids=BACKENDS.keys())
HEADS = Heads(query=6, kv=2, dim=8)
ATTENDING = Attending(8**-0.5)
SPEC = KvSpec(num_layers=2, num_blocks=40, block_size=4, num_kv_heads=2, head_dim=8)
INV_FREQ = [1.0, 0.3, 0.05, 0.004]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=2e-5)


def rows_of(*rows: tuple[int, int, tuple[int, ...]]) -> Rows:
    """Rows of (start, count, pages)."""
    starts, counts, tables = zip(*rows, strict=True)
    return Rows([0] * sum(counts), starts, counts, tables)


def rotate(x: Tensor, positions: list[int]) -> Tensor:
    """x [tokens, heads, dim] as complex numbers, each pair turned by its angle."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.tensor(positions).double(), torch.tensor(INV_FREQ, dtype=torch.float64))
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def attend(qkv: Tensor) -> Tensor:
    """Causal attention of one sequence from position 0, in float64, a token and a head at a time."""
    q, k, v = qkv.double().view(len(qkv), -1, HEADS.dim).split([HEADS.query, HEADS.kv, HEADS.kv], 1)  # type: ignore[no-untyped-call]  # torch's
    q, k = rotate(q, list(range(len(q)))), rotate(k, list(range(len(k))))
    out = torch.empty_like(q)
    for t in range(len(q)):
        for h in range(HEADS.query):
            g = h // (HEADS.query // HEADS.kv)
            out[t, h] = torch.softmax(k[: t + 1, g] @ q[t, h] / HEADS.dim**0.5, 0) @ v[: t + 1, g]
    return out.flatten(1)


def padded(ops: Backend, x: Tensor) -> Tensor:
    """As a backend pads a step: to whole tiles of 16 in the deterministic CPU backend."""
    if isinstance(ops, CpuBackend):
        return torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 16)) if ops.deterministic else x
    return x.to(ops.dtype) if isinstance(ops, ReferenceBackend) else x


@backends
def test_a_linear_stacks_its_matrices_and_adds_their_biases(ops: Backend) -> None:
    x, first, second = noise(16, 12), noise(5, 12, seed=1), noise(7, 12, seed=2)
    weight = ops.prepare_linear([first, second], [noise(5, seed=3), noise(7, seed=4)])
    expected = torch.cat([x @ first.T + noise(5, seed=3), x @ second.T + noise(7, seed=4)], -1)
    close(ops.linear(padded(ops, x), weight), expected)


@backends
def test_norms_divide_by_the_root_of_the_mean_square(ops: Backend) -> None:
    x, residual, weight = noise(16, 24), noise(16, 24, seed=1), noise(24, seed=2)
    prepared = ops.prepare_vector(weight)

    def norm(y: Tensor) -> Tensor:
        return y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    close(ops.rms_norm(padded(ops, x), prepared, 1e-5), norm(x))
    normed, total = ops.add_rms_norm(padded(ops, x), padded(ops, residual), prepared, 1e-5)
    close(normed, norm(x + residual))
    close(total, x + residual)


@backends
def test_the_gate_comes_first_and_goes_through_silu(ops: Backend) -> None:
    gate, up = noise(16, 10) * 5, noise(16, 10, seed=1)
    close(ops.gated(padded(ops, torch.cat([gate, up], -1)), "silu"), gate * torch.sigmoid(gate) * up)


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


@backends
def test_attention_over_scattered_pages_equals_attention_over_the_whole_sequence(ops: Backend) -> None:
    kv, rope = ops.allocate_kv(SPEC), ops.prepare_rope(INV_FREQ, 256)
    lengths = {0: 23, 1: 70, 2: 5, 3: 9}
    sequences = {i: noise(n, (HEADS.query + 2 * HEADS.kv) * HEADS.dim, seed=i) for i, n in lengths.items()}
    pages = torch.randperm(SPEC.num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    tables = {i: tuple(pages.pop() for _ in range(-(-n // SPEC.block_size))) for i, n in lengths.items()}
    # Two steps: prompts in odd chunks beside single tokens, then the rest.
    steps = [
        [(0, 0, 22), (1, 0, 33), (2, 0, 4), (3, 0, 1)],
        [(0, 22, 1), (1, 33, 37), (2, 4, 1), (3, 1, 8)],
    ]
    outs: dict[int, list[Tensor]] = {i: [] for i in lengths}
    for step in steps:
        batch = ops.begin(rows_of(*((start, count, tables[i]) for i, start, count in step)), kv)
        qkv = padded(ops, torch.cat([sequences[i][start : start + count] for i, start, count in step]))
        q = ops.rope_and_write_kv(qkv, HEADS, rope, kv, 1, batch)
        out = ops.paged_attention(q, HEADS, ATTENDING, kv, 1, batch)
        for (i, _, _), part in zip(
            step, torch.split(out[: sum(s[2] for s in step)], [s[2] for s in step]), strict=True
        ):
            outs[i].append(part)
    for i, sequence in sequences.items():
        close(torch.cat(outs[i]), attend(sequence))


@backends
def test_what_a_former_owner_left_in_a_page_reaches_nobody(ops: Backend) -> None:
    rope = ops.prepare_rope(INV_FREQ, 256)
    qkv = noise(6, (HEADS.query + 2 * HEADS.kv) * HEADS.dim)
    kv = ops.allocate_kv(SPEC)
    for page_content in (getattr(kv, "pages", kv),):
        page_content[:, :, :30] = float("nan")
    batch = ops.begin(rows_of((0, 6, (7, 3))), kv)
    q = ops.rope_and_write_kv(padded(ops, qkv), HEADS, rope, kv, 0, batch)
    close(ops.paged_attention(q, HEADS, ATTENDING, kv, 0, batch)[:6], attend(qkv))


@backends
def test_a_scrubbed_page_is_zero_in_every_layer_and_its_neighbours_are_not(ops: Backend) -> None:
    kv = ops.allocate_kv(SPEC)
    pages = getattr(kv, "pages", kv)
    pages.fill_(1)
    ops.scrub(kv, [3, 5])
    assert pages[:, :, [3, 5]].abs().sum() == 0
    assert (pages[:, :, [2, 4, 6]] == 1).all()
