"""A whole step as one program: recorded once from a model's ops, its buffers planned, then run in one call.

While a model's ops are recorded its activations are values without numbers. Every producer then writes the forms
that its readers multiply with, so that none makes a pass of its own to round them, and no float32 that nobody
reads; and values whose lives do not overlap share memory. The numbers are those of the ops run one by one.

Behind the last layer's attention a token's row matters to nobody but itself: where logits alone are wanted, the
ops there run over the picked rows. Of a prompt that is most of a layer saved.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from ctypes import Structure
from dataclasses import dataclass, field
from operator import add, gt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.native import layout, nodes
from kernels.native.kv import KvPages, StepRows, fresh_blocks, lay_out
from kernels.native.library import CL_OP_PICK, ClLimits, ClOp, ClRows, ClStep, Library, threads
from kernels.native.memory import aligned_empty
from kernels.native.nodes import F32, PLAIN, Forms, Node
from kernels.native.recording import StepOps
from kernels.ops import Attending, Heads, Rows
from kernels.steps import StepLimits, StepModel

_LINE = 64


class Value:
    """An activation of the recorded step.

    Attributes:
        width: numbers of a row.
        picked: its rows are the picked ones, not all tokens.
    """

    __slots__ = ("picked", "width")

    def __init__(self, width: int, picked: bool = False) -> None:
        self.width, self.picked = width, picked


class Recording(NamedTuple):
    """The ops of a step, and what is wanted of it."""

    nodes: list[Node[Value]]
    hidden: Value
    logits: Value

    @property
    def tail(self) -> int:
        """From which op on all rows are picked ones."""
        return next(
            (i for i, node in enumerate(self.nodes) if any(value.picked for value, _ in node.reads)),
            len(self.nodes),
        )


class _Recorder(StepOps[Value]):
    """Ops that are written down.

    Args:
        weights_dtype: of plain weights.
        last: the layer behind whose attention the picked rows go on alone; -1: none.
    """

    def __init__(self, weights_dtype: torch.dtype, last: int) -> None:
        super().__init__(weights_dtype)
        self.nodes: list[Node[Value]] = []
        self._last = last

    def paged_attention(
        self, q: Value, heads: Heads, attending: Attending, kv: KvPages, layer: int, batch: None
    ) -> Value:
        """Of the last layer, the picked rows."""
        out = super().paged_attention(q, heads, attending, kv, layer, batch)
        return self._pick(out, ()) if layer == self._last else out

    def add(self, x: Value, residual: Value, scale: float = 1.0) -> Value:
        """Of the rows of x."""
        return super().add(x, self._beside(x, residual), scale)

    def add_rms_norm(
        self, x: Value, residual: Value, weight: Tensor, eps: float, scale: float = 1.0
    ) -> tuple[Value, Value]:
        """Of the rows of x."""
        return super().add_rms_norm(x, self._beside(x, residual), weight, eps, scale)

    def _beside(self, x: Value, other: Value) -> Value:
        return self._pick(other, ()) if x.picked else other

    def _width(self, x: Value) -> int:
        return x.width

    def _is_picked(self, x: Value) -> bool:
        return x.picked

    def _pick(self, x: Value, tokens: Sequence[int]) -> Value:
        if x.picked:
            return x
        out = Value(x.width, picked=True)
        self._emit(nodes.pick(x, out))
        return out

    def _new(self, like: Value, width: int) -> Value:
        return Value(width, like.picked)

    def _tokens(self, batch: None, width: int) -> Value:
        return Value(width)

    def _own(self, qkv: Value) -> Value:
        return qkv

    def _queries(self, qkv: Value, heads: Heads) -> Value:
        return qkv

    def _whole(self, q: Value, heads: Heads) -> Value:
        return q

    def _emit(self, node: Node[Value], batch: None = None) -> None:
        self.nodes.append(node)


def record(model: StepModel, kv: KvPages, weights_dtype: torch.dtype, *, whole: bool = True) -> Recording:
    """The ops of one run of `model`.

    Args:
        model: whose ops.
        kv: pages of all of its layers.
        weights_dtype: of plain weights.
        whole: what all tokens come to is wanted, and not only of the picked ones.
    """
    ops: Any = _Recorder(weights_dtype, -1 if whole else kv.spec.num_layers - 1)
    hidden: Any = model(ops, kv, None)
    logits: Any = model.logits(ops, hidden, ())
    found = Recording(ops.nodes, hidden, logits)
    behind = (
        value.picked or node.code == CL_OP_PICK for node in ops.nodes[found.tail :] for value, _ in node.reads
    )
    return found if all(behind) else record(model, kv, weights_dtype)  # attention has something beside it


def forms_of(recording: Recording) -> dict[Value, Forms]:
    """In which forms each value that somebody reads is written.

    A ClRows has one int8 form: where two are wanted the second reader gets float32, and rounds for itself.
    """
    wanted: dict[Value, Forms] = {recording.hidden: PLAIN, recording.logits: PLAIN}
    for node in recording.nodes:
        for value, forms in node.reads:
            wanted[value] = wanted.get(value, frozenset()) | forms
    made = {node.makes for node in recording.nodes}
    return {value: _possible(forms) if value in made else PLAIN for value, forms in wanted.items()}


def _possible(forms: Forms) -> Forms:
    integers = sorted(form for form in forms if form.item == layout.INT8)
    return forms if len(integers) < 2 else forms - set(integers[1:]) | PLAIN


class Buffers(NamedTuple):
    """Where the parts of a value lie, in bytes from its first.

    Attributes:
        f32: None where there are none; and so the rest.
        bf16: likewise.
        int8: likewise.
        scales: of int8.
        sums: of int8.
        size: of all.
    """

    f32: int | None
    bf16: int | None
    int8: int | None
    scales: int | None
    sums: int | None
    size: int


def buffers(forms: Forms, width: int, rows: int) -> Buffers:
    """The parts of a value [rows, width] that is written in `forms`."""
    padded = _up(width, layout.STRIDE)
    whole = next((form for form in forms if form.item == layout.INT8), None)
    scales, sums = (0, 0) if whole is None else layout.scales_and_sums(whole, width)
    sizes = {
        "f32": 4 * rows * width if F32 in forms else 0,
        "bf16": 2 * rows * padded if nodes.BF16 in forms else 0,
        "int8": rows * padded if whole else 0,
        "scales": 4 * rows * scales,
        "sums": 4 * rows * sums,
    }
    at, places = 0, {}
    for name, size in sizes.items():
        places[name] = at if size else None
        at += _up(size, _LINE)
    return Buffers(**places, size=at)


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


class Plan(NamedTuple):
    """Where each value lies in the arena."""

    forms: dict[Value, Forms]
    parts: dict[Value, Buffers]
    places: dict[Value, int]
    size: int


def plan(recording: Recording, limits: StepLimits) -> Plan:
    """Places for all values, of which those that are needed at once do not overlap.

    A sum takes the place of what it was added to, if that is not read any more.
    """
    forms = forms_of(recording)
    parts = {
        value: buffers(of, value.width, limits.rows if value.picked else limits.tokens)
        for value, of in forms.items()
    }
    last = {value: i for i, node in enumerate(recording.nodes) for value, _ in node.reads}
    last |= dict.fromkeys((recording.hidden, recording.logits), len(recording.nodes))
    arena = _Arena()
    for i, node in enumerate(recording.nodes):
        made = [value for value in (*node.plain, node.makes) if value is not None and value in parts]
        if node.replaces is not None and node.plain and node.plain[-1] in parts and last[node.replaces] == i:
            made.remove(node.plain[-1])
            arena.hand_over(node.replaces, node.plain[-1])
        for value in made:
            arena.take(value, parts[value].size)
        for value in {value for value, _ in node.reads if last[value] == i}:
            arena.release(value)
    return Plan(forms, parts, arena.places, arena.size)


@dataclass
class _Arena:
    """Memory that values take and release, always the first hole that is large enough."""

    places: dict[Value, int] = field(default_factory=dict)
    size: int = 0
    _held: dict[Value, tuple[int, int]] = field(default_factory=dict)

    def take(self, value: Value, size: int) -> None:
        at = 0
        for first, length in sorted(self._held.values()):
            if at + size <= first:
                break
            at = max(at, first + length)
        self._held[value] = at, size
        self.places[value] = at
        self.size = max(self.size, at + size)

    def hand_over(self, value: Value, to: Value) -> None:
        self._held[to] = self._held.pop(value)
        self.places[to] = self.places[value]

    def release(self, value: Value) -> None:
        self._held.pop(value, None)  # None: it was handed over


class _Places:
    """Values as handles; a `kernels.native.nodes.Addresses`.

    Args:
        planned: where they lie.
        arena: address of its first byte.
    """

    def __init__(self, planned: Plan, arena: int) -> None:
        self.planned, self._arena = planned, arena
        self.kept: list[Any] = []

    def f32(self, value: Value | None, /) -> int | None:
        return None if value not in self.planned.places else self._at(value, self.planned.parts[value].f32)

    def rows(self, value: Value, forms: Forms | None = None, /) -> int:
        """To read: with what there is of these forms, and float32 where one is missing."""
        parts, there = self.planned.parts[value], self.planned.forms[value]
        shown = there if forms is None else forms & there
        if forms is not None and forms - there:
            shown |= PLAIN
        whole = next((form for form in shown if form.item == layout.INT8), None)
        rows = ClRows(width=value.width, group=whole.group if whole else 0)
        if F32 in shown:
            rows.f32 = self._at(value, parts.f32)
        if nodes.BF16 in shown:
            rows.bf16 = self._at(value, parts.bf16)
        if whole:
            for name in ("int8", "scales", "sums"):
                setattr(rows, name, self._at(value, getattr(parts, name)))
        return self.keep(rows)

    def keep(self, struct: Structure | ctypes.Array[Any], /) -> int:
        self.kept.append(struct)
        return ctypes.addressof(struct)

    def _at(self, value: Value, part: int | None) -> int | None:
        return None if part is None else self._arena + self.planned.places[value] + part


class _Program:
    """A recording as ops over an arena.

    Args:
        recording: whose weights it keeps.
        planned: where its values lie.
        arena: they lie in it.
    """

    def __init__(self, recording: Recording, planned: Plan, arena: Tensor) -> None:
        places = _Places(planned, arena.data_ptr())
        ops = [ClOp(node.code, places.keep(node.struct(places))) for node in recording.nodes]
        self.ops = (ClOp * len(ops))(*ops)
        self.tail = recording.tail
        self.recording, self._kept = recording, places.kept
        self.hidden, self.logits = (
            arena[planned.places[value] :][: planned.parts[value].size].view(torch.float32)
            for value in (recording.hidden, recording.logits)
        )

    def run(self, library: Library, step: ClStep) -> None:
        """All ops; those of the tail over the picked rows alone."""
        address = ctypes.addressof(self.ops)
        library.run(address, self.tail, ctypes.addressof(step))
        if not step.picks:
            return
        picked = ClStep.from_buffer_copy(step)
        picked.tokens = step.picks
        if step.nanoseconds:
            picked.nanoseconds = step.nanoseconds + self.tail * ctypes.sizeof(ctypes.c_int64)
        behind = address + self.tail * ctypes.sizeof(ClOp)
        library.run(behind, len(self.ops) - self.tail, ctypes.addressof(picked))


class NativeStep:
    """Two programs over one arena, and their scratch; a `kernels.steps.Step`.

    Args:
        library: runs them.
        whole: the model, with what all tokens come to.
        picked: the model for logits alone.
        kv: the pages that both read and write.
        limits: the largest step.
    """

    def __init__(
        self, library: Library, whole: Recording, picked: Recording, kv: KvPages, limits: StepLimits
    ) -> None:
        self._library, self._kv, self._limits = library, kv, limits
        planned = [plan(recording, limits) for recording in (whole, picked)]
        self._arena = aligned_empty(max(each.size for each in planned))
        self.whole, self.picked = (
            _Program(recording, each, self._arena)
            for recording, each in zip((whole, picked), planned, strict=True)
        )
        self._step = ClStep()
        self._threads = 0
        self._scratch = self._arena[:0]
        self._rows: StepRows | None = None
        self._tokens = array("i")

    def __call__(self, rows: Rows, picked: Sequence[int], *, whole: bool = True) -> tuple[Tensor | None, Tensor]:
        """See `kernels.steps.Step`."""
        self._check(rows, picked)
        self._kv.scrub(fresh_blocks(rows, self._kv.spec.block_size))
        step, program = self._step, self.whole if whole else self.picked
        self._rows, self._tokens = lay_out(rows), array("i", picked)  # kept while the program reads them
        self._rows.fill(step)
        step.picked, step.picks = self._tokens.buffer_info()[0], len(picked)
        if threads() != self._threads:
            self._resize(threads())
        program.run(self._library, step)
        hidden = _rows(program.hidden, step.tokens, program.recording.hidden) if whole else None
        return hidden, _rows(program.logits, step.picks, program.recording.logits)

    def clock(self, nanoseconds: int) -> None:
        """Add what each op takes to the int64 at this address, from now on; of whichever program."""
        self._step.nanoseconds = nanoseconds

    @property
    def arena_bytes(self) -> int:
        """What its activations take."""
        return len(self._arena)

    @property
    def scratch_bytes(self) -> int:
        """What its ops take beside, with as many threads as there are."""
        limits = ClLimits(
            tokens=self._limits.tokens,
            rows=self._limits.rows,
            picks=self._limits.rows,
            context=self._limits.context,
            threads=threads(),
        )
        return max(
            self._library.scratch_bytes(ctypes.addressof(program.ops), len(program.ops), limits)
            for program in (self.whole, self.picked)
        )

    def _check(self, rows: Rows, picked: Sequence[int]) -> None:
        longest = max(map(add, rows.starts, rows.counts), default=0)
        found = StepLimits(len(rows.token_ids), max(len(rows.starts), len(picked)), longest)
        if any(map(gt, found, self._limits)):
            raise ValueError(
                f"a step of {found.tokens} tokens in {found.rows} rows, of which the longest holds {longest}, "
                f"is over {self._limits}"
            )

    def _resize(self, count: int) -> None:
        self._threads = self._step.threads = count
        self._scratch = aligned_empty(self.scratch_bytes)
        self._step.scratch = self._scratch.data_ptr()


def _rows(flat: Tensor, count: int, value: Value) -> Tensor:
    """The first rows of a value."""
    return flat[: count * value.width].view(count, value.width)


def names(codes: Iterable[int]) -> list[str]:
    """What ops are called, for reports."""
    known = ("embed", "norm", "linear", "rope", "attention", "gated", "add", "mixture", "pick", "cap")
    return [known[code] for code in codes]
