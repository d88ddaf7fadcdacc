"""A mixture of experts from the router's scores to the weighted sum of answers, in sizes known beforehand.

    y[t] = sum over chosen e of weight[t, e] · (W_down[e] · act(W_gate[e] · x[t]) · (W_up[e] · x[t]) ...)

Four steps: choose, sort the entries by expert, ask (twice), add. Grids depend on the number of tokens alone; which
experts they chose is read on the device. In deterministic mode tiles have one size whatever the number of tokens.

Source: Shazeer et al., "Outrageously Large Neural Networks", ICLR 2017; Jiang et al., "Mixtral of Experts", 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.ops import Matrix, Routing
from kernels.packed import Packed
from kernels.triton import routing as sorting
from kernels.triton.case import MODEL, Case, Draw, Expected, expect
from kernels.triton.experts import Stacked, ask, combine, tile_rows
from kernels.triton.gated import reference as gated_reference
from kernels.triton.routing import Sorted, route, sort
from kernels.triton.stacks import beside, plain, stack

MUST = {"ask": {"wgmma", "no-i2f"}}


class Experts(NamedTuple):
    """The gated MLPs of a mixture.

    Attributes:
        gate_up: [experts, 2·inner, hidden], gate first.
        down: [experts, hidden, inner].
        gate_up_bias: float32 [experts, 2·inner], or None.
        down_bias: float32 [experts, hidden], or None.
    """

    gate_up: Stacked
    down: Stacked
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def prepare(
    gate_up: Sequence[Sequence[Matrix]],
    down: Sequence[Matrix],
    gate_up_biases: Sequence[Sequence[Tensor]],
    down_biases: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Experts:
    """The experts of a layer, in the words of `kernels.ops.Backend.prepare_experts`, with numbers of `dtype`."""
    both = [torch.cat(list(biases)) for biases in gate_up_biases]
    return Experts(
        stack([beside(matrices) for matrices in gate_up], dtype, device),
        stack(down, dtype, device),
        torch.stack(both).to(device, torch.float32) if both else None,
        torch.stack(list(down_biases)).to(device, torch.float32) if down_biases else None,
    )


class Workspace(NamedTuple):
    """What a mixture of some tokens needs beside its answer.

    Attributes:
        chosen: int32 [T, top_k].
        weights: float32 [T, top_k].
        by_expert: entries sorted.
        inner: [T · top_k, inner], of the activations' type.
        answers: [T · top_k, hidden], likewise.
    """

    chosen: Tensor
    weights: Tensor
    by_expert: Sorted
    inner: Tensor
    answers: Tensor


def allocate(x: Tensor, experts: Experts, top_k: int, *, deterministic: bool) -> Workspace:
    """Room for the tokens x [T, hidden]."""
    count, both = experts.gate_up.codes.shape[:2]
    tokens, hidden = x.shape
    entries = tokens * top_k
    rows = tile_rows(entries, (experts.gate_up, experts.down), deterministic)
    return Workspace(
        torch.empty(tokens, top_k, dtype=torch.int32, device=x.device),
        torch.empty(tokens, top_k, dtype=torch.float32, device=x.device),
        sorting.allocate(entries, count, rows, x.device),
        x.new_empty(entries, both // 2),
        x.new_empty(entries, hidden),
    )


def mixture(
    x: Tensor,
    scores: Tensor,
    experts: Experts,
    routing: Routing,
    activation: str,
    out: Tensor,
    *,
    slots: Tensor | None = None,
    deterministic: bool = False,
    workspace: Workspace | None = None,
) -> None:
    """Write the chosen experts' answers to each token, weighted and added in the experts' order.

    Args:
        x: [T, hidden], contiguous.
        scores: [T, experts], contiguous, of any float type: what the router says.
        experts: as `prepare` makes them.
        routing: how scores choose.
        activation: one of ACTIVATIONS.
        out: [T, hidden], contiguous.
        slots: int64 [T]; a token with a slot below 0 asks nobody, and its answer is 0; None: all ask.
        deterministic: the bits of a token's answer do not depend on how many there are.
        workspace: of `allocate` for as many tokens; None: made here.
    """
    room = workspace or allocate(x, experts, routing.top_k, deterministic=deterministic)
    block_m = len(room.by_expert.entries) // max(1, len(room.by_expert.tiles))
    route(scores, routing, slots, room.chosen, room.weights)
    sort(room.chosen, block_m, room.by_expert)
    ask(x, experts.gate_up, experts.gate_up_bias, room.by_expert, routing.top_k, activation, room.inner)
    ask(room.inner, experts.down, experts.down_bias, room.by_expert, 1, "", room.answers)
    combine(room.answers, room.chosen, room.weights, out)


class Mlps(NamedTuple):
    """The same experts in float64: gate and up [E, 2·inner, hidden], down [E, hidden, inner], and their biases."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor
    down_bias: Tensor


def reference(x: Tensor, scores: Tensor, mlps: Mlps, routing: Routing, activation: str) -> Tensor:
    """In float64, but that what an expert has inside, and its answer, have the type of x, as they are stored."""
    chosen, weights = sorting.reference(scores, routing)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, (some, shares) in enumerate(zip(chosen.tolist(), weights, strict=True)):
        for expert, share in zip(some, shares, strict=True):
            both = mlps.gate_up[expert] @ x[token].double() + mlps.gate_up_bias[expert]
            inner = gated_reference(both[None], activation)[0].to(x.dtype).double()
            out[token] += share * (mlps.down[expert] @ inner + mlps.down_bias[expert]).to(x.dtype).double()
    return out


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Mixtures of every form, with and without biases; tokens few and many."""
    if scale == MODEL:
        qwen = (128, 2048, 768)
        for tokens in (1, 16, 256, 512, 4096):
            yield _case(draw, torch.bfloat16, (tokens, *qwen), Routing(8, True), "silu", "plain")
        for form in ("int4", "int8", "float8"):
            yield _case(draw, torch.bfloat16, (1, *qwen), Routing(8, True), "silu", form)
        yield _case(draw, torch.bfloat16, (4096, *qwen), Routing(8, True), "silu", "int4")
        yield _case(draw, torch.bfloat16, (16, 32, 2880, 2880), Routing(4, True), "clamped_swiglu", "table")
        return
    yield _case(draw, torch.bfloat16, (5, 4, 48, 40), Routing(2, True), "silu", "plain")
    yield _case(draw, torch.float32, (3, 3, 32, 33), Routing(3, False), "gelu", "plain")
    yield _case(draw, torch.bfloat16, (2, 2, 256, 32), Routing(2, True), "silu", "int4")
    yield _case(draw, torch.bfloat16, (2, 2, 128, 32), Routing(1, False), "gelu_tanh", "zeros")
    yield _case(draw, torch.bfloat16, (2, 3, 96, 32), Routing(2, True), "clamped_swiglu", "table")
    yield _case(draw, torch.bfloat16, (2, 3, 96, 64), Routing(2, True), "silu", "int8")
    yield _case(draw, torch.bfloat16, (2, 3, 128, 128), Routing(2, True), "silu", "float8")


def _case(
    draw: Draw, dtype: torch.dtype, sizes: tuple[int, int, int, int], how: Routing, activation: str, form: str
) -> Case:
    tokens, count, hidden, inner = sizes
    x, scores = draw.normal(tokens, hidden, dtype=dtype), draw.normal(tokens, count, dtype=torch.float32)
    gate_up = [[_matrix(draw, form, inner, hidden, dtype, 2 * e + i) for i in range(2)] for e in range(count)]
    down = [_matrix(draw, form, hidden, inner, dtype, e) for e in range(count)]
    biases = draw.normal(count, 2, inner, dtype=torch.float32), draw.normal(count, hidden, dtype=torch.float32)
    is_biased = activation == "clamped_swiglu"
    held = [list(pair) for pair in biases[0]] if is_biased else [], list(biases[1]) if is_biased else []
    experts = prepare(gate_up, down, *held, dtype, draw.device)

    def run() -> tuple[Tensor, ...]:
        out = torch.empty_like(x)
        mixture(x, scores, experts, how, activation, out)
        return (out,)

    def expected() -> tuple[Expected, ...]:
        matrices = [torch.stack([torch.cat([plain(one) for one in pair]) for pair in gate_up])]
        matrices.append(torch.stack([plain(one) for one in down]))
        mlps = Mlps(*matrices, *(bias.flatten(1).double() * is_biased for bias in biases))
        return (expect(reference(x, scores, mlps, how, activation), dtype),)

    asked = min(tokens * how.top_k, count)
    nbytes = asked * sum(part[0].nbytes for one in experts[:2] for part in one[1:6] if part is not None)
    flops = 6 * tokens * how.top_k * inner * hidden
    name = f"{tokens} tokens, {how.top_k} of {count} experts {hidden} x {inner} {form} {dtype} {activation}"
    return Case(name, run, expected, nbytes + 2 * x.nbytes, flops, "bfloat16")


def _matrix(draw: Draw, form: str, out: int, inner: int, dtype: torch.dtype, seed: int) -> Matrix:
    """One expert's matrix [out, inner]."""
    draw = replace(draw, seed=draw.seed + 1000 * seed)
    if form == "plain":
        return draw.normal(out, inner, dtype=dtype, scale=inner**-0.5)
    if form == "float8":
        scales = draw.uniform(0.01, 0.02, -(-out // 128), -(-inner // 128))
        return Packed(draw.normal(out, inner, dtype=torch.float8_e4m3fn), scales, 128, 128, 8)
    columns = {"int4": 128, "zeros": 16, "table": 32, "int8": 32}[form]
    scales = draw.uniform(0.01, 0.02, out, -(-inner // columns))
    if form == "int8":
        return Packed(draw.integers(-127, 128, out, inner), scales, 1, columns, 8)
    if form == "int4":
        return Packed(draw.integers(-8, 8, out, inner), scales, 1, columns, 4)
    codes = draw.integers(0, 16, out, inner, dtype=torch.uint8)
    if form == "zeros":
        return Packed(codes, scales, 1, columns, 4, zeros=draw.integers(0, 17, *scales.shape, dtype=torch.float32))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return Packed(codes, scales, 1, columns, 4, table=draw.given(torch.cat([values, -values])))
