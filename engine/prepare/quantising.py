"""A model's folder made into one with int8 or int4 matrices, a matrix at a time, and what that costs, measured.

int8 is rounded plainly. int4 is rounded with error feedback from a calibration text (`error_feedback.py`), and
perplexity on texts that were held out of it is measured before and after.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom

from engine.errors import EngineError
from engine.memory import available_bytes
from engine.prepare.calibration import Calibration, count, read_calibration
from engine.prepare.error_feedback import Grid, Rounded, relative_error, round_plainly, round_with_feedback
from engine.prepare.folder import ModelFolder, Named
from engine.prepare.question import Settings, Told
from engine.prepare.streaming import compute, peak_bytes, perplexity, read_plain
from engine.prepare.tables import GRIDS, round_table
from engine.prepare.weights_file import TensorPlan, WeightsWriter, writing
from engine.weights.int_weights import IntWeights

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.packed import Packed

_SCALES = {8: "F32", 4: "F16"}
_SLICE_BYTES = 256 << 20  # of inputs, squared at once


class MatrixReport(NamedTuple):
    """One matrix: how far its outputs are off, as `relative_error` counts.

    Attributes:
        name: of its plain tensor.
        rounded: had it been rounded plainly.
        error: as it is written.
        tokens: that the errors were measured over; 0: over no inputs, all alike.
    """

    name: str
    rounded: float
    error: float
    tokens: int


def quantise_folder(source: Path, out: Path, settings: Settings, told: Told) -> dict[str, Any]:
    """Write the quantised folder; what was done and what it costs, for the record.

    Args:
        source: a model's folder.
        out: an empty folder.
        settings: how.
        told: hears of progress.

    Raises:
        EngineError: QUANTISE_UNSUPPORTED, the model is quantised already, or of a kind that is not;
            CALIBRATION_MISSING, CALIBRATION_INVALID, CALIBRATION_TOO_SMALL; OUT_OF_MEMORY, with the numbers;
            DISK_FULL; those of `ModelFolder`.
    """
    torch.set_num_threads(settings.threads)
    folder = ModelFolder(source)
    if folder.quantised:
        raise EngineError("QUANTISE_UNSUPPORTED", "the model is quantised already; quantise the plain one")
    if settings.embeddings and not folder.tables:
        raise EngineError("QUANTISE_UNSUPPORTED", "embeddings are quantised of decoders alone")
    calibration = _calibration(folder, settings)
    _check_memory(folder, calibration, settings)
    work = _Work(folder, Grid(settings.bits, settings.group, settings.symmetric), settings.embeddings, told)
    before = _measure(folder, calibration, "perplexity before", told)
    with writing(out, work.plans()) as writer:
        work.run(writer, calibration)
    _write_config(folder, out, settings)
    _copy_others(source, out)
    after = _measure(ModelFolder(out), calibration, "perplexity after", told)
    return {
        "method": "error feedback" if settings.bits == 4 else "rounded",
        **{k: v for k, v in asdict(settings).items() if k not in ("calibration",)},
        "calibration": _told_of(calibration, before, after),
        "matrices": [report._asdict() for report in work.reports],
        "tables": [report._asdict() for report in work.tables],
    }


def _calibration(folder: ModelFolder, settings: Settings) -> Calibration | None:
    if settings.calibration is not None:
        config, _ = folder.decoder
        return read_calibration(settings.calibration, folder.text(), config.eos_token_ids[0], settings.tokens)
    if settings.bits == 4:
        raise EngineError("CALIBRATION_MISSING", "int4 needs a calibration text, such as the model is used for")
    return None


def _told_of(calibration: Calibration | None, before: float, after: float) -> dict[str, Any] | None:
    if calibration is None:
        return None
    return {
        "sha256": calibration.sha256,
        "texts": len(calibration.texts),
        "tokens": calibration.tokens,
        "held_out_texts": len(calibration.held_out),
        "held_out_tokens": count(calibration.held_out),
        "perplexity_before": before,
        "perplexity_after": after,
    }


def _check_memory(folder: ModelFolder, calibration: Calibration | None, settings: Settings) -> None:
    shapes = [folder.shapes[name][-2:] for name in folder.matrices]
    largest = (max(out for out, _ in shapes), max(inner for _, inner in shapes))
    tokens = 0 if calibration is None else max(calibration.tokens, count(calibration.held_out))
    needed = peak_bytes(folder, tokens, largest, settings.bits == 4)
    if settings.embeddings:  # read whole; its codes are there twice
        needed += max(4 * math.prod(folder.shapes[name]) for name in folder.tables)
    free = available_bytes()
    if needed > free:
        raise EngineError(
            "OUT_OF_MEMORY",
            f"quantising over {tokens} tokens at once takes about {needed} bytes, {free} are free; "
            "fewer with --calibration-tokens",
        )


def _measure(folder: ModelFolder, calibration: Calibration | None, stage: str, told: Told) -> float:
    if calibration is None:
        return 0.0
    told(stage, 0, 0)
    found = perplexity(folder, calibration.held_out)
    return round(found, 6)


class _Work:
    """Quantises matrices as they come, and writes them."""

    def __init__(self, folder: ModelFolder, grid: Grid, embeddings: int, told: Told) -> None:
        self._folder = folder
        self._grid = grid
        self._embeddings = embeddings
        self._told = told
        self._wanted = sorted(folder.matrices)
        if any(len(folder.shapes[name]) != 2 for name in self._wanted):
            raise EngineError("QUANTISE_UNSUPPORTED", "experts in one tensor are not quantised here")
        self._left = set(self._wanted)
        self._sizes = {name: math.prod(folder.shapes[name]) for name in self._wanted}
        self._done = 0
        self.reports: list[MatrixReport] = []
        self.tables: list[MatrixReport] = []

    def plans(self) -> dict[str, TensorPlan]:
        """What is written: in the place of each matrix what it becomes, the rest as it was."""
        plans: dict[str, TensorPlan] = {}
        for name, entry in sorted(self._folder.entries.items()):
            if name in self._left:
                plans |= _plans(name, entry.shape, self._grid)
            elif self._is_rounded_table(name):
                plans |= _plans(name, entry.shape, GRIDS[self._embeddings])
            else:
                plans[name] = TensorPlan(entry.dtype, entry.shape)
        return plans

    def run(self, writer: WeightsWriter, calibration: Calibration | None) -> None:
        """Write everything."""
        tables: dict[str, Packed] = {}
        for name in self._folder.entries:
            if self._is_rounded_table(name):
                table = self._round_table(name, writer)
                tables |= {name: table} if name in self._folder.embeddings else {}
            elif name not in self._left:
                writer.write(name, self._folder.pieces(name))
        if calibration is not None:
            compute(self._folder, calibration.texts, lambda names, x: self._multiply(names, x, writer), tables)
        for name in sorted(self._left):  # without a calibration all; else experts that no token chose
            self._quantise(name, None, 0, writer)

    def _is_rounded_table(self, name: str) -> bool:
        return bool(self._embeddings) and name in self._folder.tables

    def _round_table(self, name: str, writer: WeightsWriter) -> Packed:
        grid = GRIDS[self._embeddings]
        with torch.inference_mode():
            made = round_table(
                self._folder.tensor(name), self._embeddings, lambda found: _stored(name, found, grid)
            )
        for key, pieces in made.content.items():
            writer.write(key, pieces)
        self.tables.append(MatrixReport(name, round(made.error, 6), round(made.error, 6), 0))
        return made.packed

    def _multiply(self, matrices: tuple[Named, ...], x: Tensor, writer: WeightsWriter) -> Tensor:
        if matrices[0].name not in self._left:
            return torch.cat([F.linear(x, read_plain(self._folder, matrix.name)) for matrix in matrices], -1)
        gram = _gram(x)
        return torch.cat([F.linear(x, self._quantise(m.name, gram, len(x), writer)) for m in matrices], -1)

    def _quantise(self, name: str, gram: Tensor | None, tokens: int, writer: WeightsWriter) -> Tensor:
        """Round one matrix, write it, report of it; the numbers it now stands for."""
        with torch.inference_mode():
            weight = read_plain(self._folder, name)
            found = plainly = round_plainly(weight, self._grid)
            if gram is not None and self._grid.bits == 4:
                found = round_with_feedback(weight, gram, self._grid)
            plain = found.plain()
            rounded = relative_error(weight, plainly.plain(), gram)
            error = relative_error(weight, plain, gram) if found is not plainly else rounded
        self.reports.append(MatrixReport(name, round(rounded, 6), round(error, 6), tokens))
        for key, content in _stored(name, found, self._grid).items():
            writer.write(key, [content])
        self._left.remove(name)
        self._done += self._sizes[name]
        self._told("quantising", self._done, sum(self._sizes.values()))
        return plain


def _plans(name: str, shape: tuple[int, ...], grid: Grid) -> dict[str, TensorPlan]:
    """The tensors in the place of a matrix."""
    stored = IntWeights(*grid).stored(name, shape)
    return {
        key: TensorPlan(value.dtypes[0] if key.endswith(".codes") else _SCALES[grid.bits], value.shapes[0])
        for key, value in stored.items()
    }


def _gram(x: Tensor) -> Tensor:
    """The sum of x·xᵀ over all rows."""
    total = torch.zeros(x.shape[1], x.shape[1])
    for some in torch.split(x, max(1, _SLICE_BYTES // (4 * x.shape[1]))):
        total.addmm_(some.T, some)
    return total


def _stored(name: str, found: Rounded, grid: Grid) -> Mapping[str, bytes]:
    """The tensors of our own format; see `engine.weights.int_weights`."""
    layer = name.removesuffix(".weight")
    codes = found.codes
    if grid.bits == 4:
        whole = F.pad(codes - grid.lowest, (0, codes.shape[1] % 2)).to(torch.uint8)
        codes = whole[:, 0::2] | whole[:, 1::2] << 4
    kind = torch.float16 if grid.bits == 4 else torch.float32
    tensors = {"codes": codes, "scales": found.scales.to(kind)}
    if found.zeros is not None:
        tensors["zeros"] = found.zeros.to(kind)
    return {f"{layer}.{key}": tensor.contiguous().numpy().tobytes() for key, tensor in tensors.items()}


def _write_config(folder: ModelFolder, out: Path, settings: Settings) -> None:
    stated = {"quant_method": "cloister", **_told_as(Grid(settings.bits, settings.group, settings.symmetric))}
    if settings.embeddings:
        stated["embeddings"] = _told_as(GRIDS[settings.embeddings])
    text = json.dumps({**folder.raw, "quantization_config": stated}, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def _told_as(grid: Grid) -> dict[str, Any]:
    return {"bits": grid.bits, "group_size": grid.group, "symmetric": grid.symmetric}


def _copy_others(source: Path, out: Path) -> None:
    """Every other file of the source that a bundle would take."""
    for path in _visible(source):
        if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
            continue
        target = out / path.relative_to(source)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            copyfile(path, target, follow_symlinks=False)


def _visible(folder: Path) -> Iterator[Path]:
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(base) / name for name in sorted(names) if not name.startswith("."))
