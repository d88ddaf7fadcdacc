"""What quantising costs the demo models: `python -m benchmarks.demo_models.quantised --model m`.

Quantises a committed model as `cloister bundle build --quantize` does, calibrated with notes of its training, and
counts fields right before and after. `--calibration FILE` writes those notes and ends; `--folder` counts the
fields of any other folder, plain or quantised; of one that does not say so itself, `--wide` where its model was
trained with wide notes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.demo_models.answering import Model
from benchmarks.demo_models.evaluate import COUNT, DEMO, MODELS, SEED, Tally
from benchmarks.demo_models.notes import SPLITS, draw
from engine.prepare.folder import ModelFolder
from engine.prepare.quantising import quantise_folder
from engine.prepare.question import Settings
from engine.prepare.streaming import read_plain

CALIBRATION_SEED, NOTES = 3000, 512
WAYS = {  # bits, group, symmetric, bits of embeddings
    "int8": (8, 0, True, 0),
    "int8, embeddings int8": (8, 0, True, 8),
    "int4 g32": (4, 32, False, 0),
    "int4 g32, embeddings int8": (4, 32, False, 8),
    "int4 g32, embeddings int4": (4, 32, False, 4),
    "int4 g128": (4, 128, False, 0),
    "int4 g128, embeddings int8": (4, 128, False, 8),
    "int4 g128, embeddings int4": (4, 128, False, 4),
}


class Result(NamedTuple):
    """What a way came to: fields right by split, perplexity before and after, the matrices' mean errors."""

    tallies: dict[str, Tally]
    before: float
    after: float
    error: float
    rounded: float


def write_calibration(path: Path, wide: bool) -> None:
    """Notes with their answers, as training draws them; none of them is ever measured with."""
    lines = [
        {"messages": [*note.messages, {"role": "assistant", "content": note.answer}]}
        for note in draw(CALIBRATION_SEED, NOTES, "train", wide=wide)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def load(folder: Path) -> Model:
    """A folder for transformers, its quantised matrices as the numbers they stand for."""
    source = ModelFolder(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    plain = {name: read_plain(source, name) for name in source.shapes}
    missing, unexpected = network.load_state_dict(plain, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise ValueError(f"{folder} is not what transformers makes of its configuration")
    network.tie_weights()
    network.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    return Model(network, tokenizer)


def fields_right(model: Model, wide: bool, splits: Sequence[str], count: int) -> dict[str, Tally]:
    """A tally for each split, of the notes that the models' cards are measured with."""
    return {split: Tally.of(model.answer(draw(SEED, count, split, wide=wide))) for split in splits}  # type: ignore[arg-type]  # argparse has checked them


def quantised(source: Path, way: str, calibration: Path, wide: bool, splits: Sequence[str], count: int) -> Result:
    """Quantise in one way, and measure."""
    bits, group, symmetric, embeddings = WAYS[way]
    settings = Settings(bits, group, symmetric, calibration, 1 << 15, torch.get_num_threads(), embeddings)
    with tempfile.TemporaryDirectory() as folder:
        report = quantise_folder(source, Path(folder), settings, lambda stage, done, total: None)
        found = fields_right(load(Path(folder)), wide, splits, count)
    errors = report["matrices"]
    return Result(
        found,
        report["calibration"]["perplexity_before"],
        report["calibration"]["perplexity_after"],
        sum(each["error"] for each in errors) / len(errors),
        sum(each["rounded"] for each in errors) / len(errors),
    )


def table(plain: dict[str, Tally], ways: dict[str, Result]) -> str:
    """Markdown: a line for the model as it is, and one for each way."""
    lines = [
        f"| | {' | '.join(plain)} | perplexity | mean error of a matrix (plainly rounded) |",
        "|---|" + "--:|" * (len(plain) + 2),
        _line("as published", plain, f"{next(iter(ways.values())).before:.4f} | "),
    ]
    for way, result in ways.items():
        more = f"{result.after:.4f} | {result.error:.2%} ({result.rounded:.2%})"
        lines.append(_line(way, result.tallies, more))
    return "\n".join(lines)


def _line(name: str, tallies: dict[str, Tally], more: str) -> str:
    return f"| {name} | " + " | ".join(f"{tally.share():.2%}" for tally in tallies.values()) + f" | {more} |"


def is_wide(folder: Path) -> bool:
    """Whether a folder says that its model was trained with wide notes."""
    path = folder / "training.json"
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8"))["recipe"].get("wide"))


def main() -> None:
    """Quantise and measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", choices=MODELS, help="one of the committed models")
    which.add_argument("--folder", type=Path, help="count the fields of this folder, plain or quantised")
    parser.add_argument("--wide", action="store_true", help="notes as the larger model's training has them")
    parser.add_argument("--way", choices=WAYS, action="append", help="(default: all)")
    parser.add_argument("--split", choices=SPLITS, action="append", help="(default: all)")
    parser.add_argument("--count", type=int, default=COUNT, help=f"notes of each split (default {COUNT})")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="write the calibration notes, and end")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    source = chosen.folder or DEMO / f"demo-notes-{chosen.model}"
    wide = chosen.wide or is_wide(source)
    if chosen.calibration:
        write_calibration(chosen.calibration, wide)
        return
    splits = chosen.split or SPLITS
    plain = fields_right(load(source), wide, splits, chosen.count)
    if chosen.folder:
        print("\n".join(f"{split}: {tally.share():.2%}" for split, tally in plain.items()))
        return
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "notes.jsonl"
        write_calibration(calibration, wide)
        results = {}
        for way in chosen.way or WAYS:
            results[way] = quantised(source, way, calibration, wide, splits, chosen.count)
    print(table(plain, results))


if __name__ == "__main__":
    main()
