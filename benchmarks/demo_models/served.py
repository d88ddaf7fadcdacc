"""What number types of served models cost the demo's: `python -m benchmarks.demo_models.served --model m`.

Quantises a committed model in each way as `cloister bundle build --quantize` does, and answers notes with it
through the engine: with exact inputs (float32, each quantised number what it stands for), as it is deployed
(bfloat16, in which int8 and int4 matrices meet inputs rounded to bytes), and so with keys and values in int8, too.
Fields right of each, and how far its logits are off those with exact inputs after a prompt and half its answer: in
the root mean square, and how often another token is the likeliest.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.demo_models.answering import Answer
from benchmarks.demo_models.evaluate import DEMO, MODELS, SEED, Tally
from benchmarks.demo_models.notes import SPLITS, Note, draw
from benchmarks.demo_models.quantised import WAYS, is_wide, write_calibration
from engine.bench.subject import of_folder
from engine.loop import EngineLoop
from engine.options import EngineOptions
from engine.plan import StepPlan
from engine.prepare.folder import ModelFolder
from engine.prepare.quantising import quantise_folder
from engine.prepare.question import Settings
from engine.request import Request, SamplingParams, StopCriteria
from engine.text.model import TextModel
from engine.text.template import Message

PLAIN = "plain"
TYPES = {  # dtype, kv_dtype
    "exact inputs": ("float32", "float32"),
    "as deployed": ("bfloat16", "bfloat16"),
    "with int8 KV": ("bfloat16", "int8"),
}
_ROWS, _BLOCK, _LONGEST_ANSWER = 32, 16, 160


class Result(NamedTuple):
    """What one way and one choice of types came to."""

    tallies: dict[str, Tally]
    logits: torch.Tensor  # [notes, vocabulary]


def options_for(backend: str, dtype: str, kv_dtype: str, context: int, threads: int) -> EngineOptions:
    """Options with room for `_ROWS` whole contexts."""
    return EngineOptions(
        backend=backend,
        dtype=dtype,
        kv_dtype=kv_dtype,
        kv_blocks=_ROWS * (context // _BLOCK + 1),
        block_size=_BLOCK,
        max_running=_ROWS,
        max_step_tokens=512 + _ROWS,
        max_context_tokens=context,
        threads=threads,
    )


def ask(loop: EngineLoop, prompts: Sequence[Sequence[int]], most: int) -> list[str]:
    """Greedy answers to all prompts."""
    pieces: list[list[str]] = [[] for _ in prompts]
    for i, ids in enumerate(prompts):
        loop.submit(Request(i, list(ids), SamplingParams(), StopCriteria(most), "notes"))
    while loop.has_work:
        for row in loop.step():
            pieces[row.handle].append(row.text)
    return ["".join(some) for some in pieces]


def last_logits(loop: EngineLoop, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits [prompts, vocabulary] of what follows each."""
    seen: dict[int, torch.Tensor] = {}
    runner: Any = loop._runner
    compute = runner.compute

    def recording(plan: StepPlan) -> tuple[Any, Any]:
        hidden, logits = compute(plan)
        sampled = [row for row in plan.rows if row.sampling_slot is not None]
        seen.update({row.handle: logits[i].clone() for i, row in enumerate(sampled)})
        return hidden, logits

    runner.compute = recording
    ask(loop, prompts, 1)
    runner.compute = compute
    return torch.stack([seen[i] for i in range(len(prompts))])


def prompt_of(text: TextModel, note: Note) -> list[int]:
    """The tokens of a note's question."""
    return text.from_conversation([Message(**message) for message in note.messages])


def begun(text: TextModel, note: Note) -> list[int]:
    """A note's question with half the answer."""
    answer = text.tokenize(note.answer, add_special_tokens=False)
    return prompt_of(text, note) + answer[: len(answer) // 2]


def served(folder: Path, notes: dict[str, list[Note]], options: EngineOptions) -> Result:
    """Answers and logits of a folder with these options."""
    text, loop = ModelFolder(folder).text(), of_folder(folder, options).loop
    tallies = {}
    for split, some in notes.items():
        said = ask(loop, [prompt_of(text, note) for note in some], _LONGEST_ANSWER)
        tallies[split] = Tally.of([Answer(note, text, 0.0) for note, text in zip(some, said, strict=True)])
    return Result(tallies, last_logits(loop, [begun(text, note) for some in notes.values() for note in some]))


def _line(way: str, types: str, found: Result, exact: Result) -> str:
    error = float((found.logits - exact.logits).norm() / exact.logits.norm())
    other = float((found.logits.argmax(-1) != exact.logits.argmax(-1)).float().mean())
    shares = [f"{tally.share():.2%}" for tally in found.tallies.values()]
    return f"| {way} | {types} | " + " | ".join([*shares, f"{error:.2%}", f"{other:.2%}"]) + " |"


def _folder(source: Path, way: str, calibration: Path, out: Path) -> Path:
    if way == PLAIN:
        return source
    out.mkdir()
    bits, group, symmetric, embeddings = WAYS[way]
    settings = Settings(bits, group, symmetric, calibration, 1 << 15, torch.get_num_threads(), embeddings)
    quantise_folder(source, out, settings, lambda stage, done, total: None)
    return out


def main() -> None:
    """Measure, and print a line for each way and choice of types."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--backend", default="cpu", help="(default %(default)s)")
    parser.add_argument("--way", choices=(PLAIN, *WAYS), action="append", help="(default: all)")
    parser.add_argument("--split", choices=SPLITS, action="append", help="(default: all)")
    parser.add_argument("--count", type=int, default=600, help="notes of each split (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    source = DEMO / f"demo-notes-{chosen.model}"
    wide = is_wide(source)
    notes = {split: draw(SEED, chosen.count, split, wide=wide) for split in chosen.split or SPLITS}
    context = ModelFolder(source).served.config.max_context_tokens
    print(
        f"| model | types | {' | '.join(notes)} | logits off | another likeliest |\n|---|---|"
        + "--:|" * (len(notes) + 2)
    )
    with tempfile.TemporaryDirectory() as kept:
        calibration = Path(kept) / "notes.jsonl"
        write_calibration(calibration, wide)
        for i, way in enumerate(chosen.way or (PLAIN, *WAYS)):
            folder, exact = _folder(source, way, calibration, Path(kept) / str(i)), None
            for types, (dtype, kv_dtype) in TYPES.items():
                options = options_for(chosen.backend, dtype, kv_dtype, context, chosen.threads)
                found = served(folder, notes, options)
                exact = exact or found
                print(_line(way, types, found, exact), flush=True)


if __name__ == "__main__":
    main()
