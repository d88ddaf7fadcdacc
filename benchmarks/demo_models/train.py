"""Train a demo model: `python -m benchmarks.demo_models.train --model s` (from nothing) or `m` (grown from s).

Writes tokenizer, weights, model card and canaries to `demo/NAME/`. The data never repeats: every batch is newly
drawn notes. Under `torchrun --nproc-per-node 2 -m …` two processes of one thread share each batch: that is faster
than two threads, which wait for each other at every operation instead of once a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.demo_models import attention
from benchmarks.demo_models.evaluate import field_table, write_all
from benchmarks.demo_models.grow import grow
from benchmarks.demo_models.notes import Note, Style, Variety, stream
from benchmarks.demo_models.together import average, exchange, place, share
from benchmarks.demo_models.tokens import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    SPECIAL,
    SYSTEM,
    USER,
    save_tokenizer,
    train_tokenizer,
)

ROOT = Path(__file__).parents[2]
Record = dict[str, Any]  # of training.json
SYSTEM_PROMPT = "You extract the fields of a note and answer with one JSON object."


@dataclass(frozen=True)
class Recipe:
    """All that decides a model: shape, data, schedule."""

    name: str
    vocabulary: int = 1280
    hidden: int = 192
    layers: int = 5
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 384
    context: int = 1024
    seed: int = 1
    steps: int = 2400
    rows: int = 32
    warmup: int = 100
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    minutes: float = 0.0
    invented: float = 0.6
    two_turns: float = 0.08
    system_prompts: float = 0.05
    grown_from: str = ""
    growth_noise: float = 0.0
    wide: bool = False
    garbled: float = 0.0
    reworded: float = 0.0
    mixed: float = 0.0
    crowded: float = 0.0
    crossed: float = 0.0

    @property
    def style(self) -> Style:
        """How the training notes are written."""
        variety = Variety(self.garbled, self.reworded, self.mixed, self.crowded, self.crossed)
        return Style(invented=self.invented, wide=self.wide, variety=variety)


RECIPES = {
    "s": Recipe("demo-notes-s"),
    "m": Recipe(
        "demo-notes-m",
        hidden=384,
        layers=6,
        heads=12,
        kv_heads=4,
        intermediate=768,
        seed=2,
        minutes=100.0,
        warmup=40,
        learning_rate=2.5e-3,
        grown_from="demo-notes-s",
        growth_noise=0.5,
        wide=True,
        garbled=0.35,
        reworded=0.3,
        mixed=0.15,
        crowded=0.15,
        crossed=0.12,
    ),
}


def build(recipe: Recipe) -> LlamaForCausalLM:
    """A Llama of the recipe's shape: grown from a smaller model, or with fresh weights."""
    if recipe.grown_from:
        small = LlamaForCausalLM.from_pretrained(ROOT / "demo" / recipe.grown_from, dtype=torch.float32)
        return grow(small, recipe.layers, recipe.growth_noise, recipe.seed)
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
        initializer_range=0.04,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config)


def build_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer of the model it grew from, or one trained on 20 000 training notes with their answers."""
    if recipe.grown_from:
        return Tokenizer.from_file(str(ROOT / "demo" / recipe.grown_from / "tokenizer.json"))
    notes = itertools.islice(stream(recipe.seed + 1, "train", style=Style(invented=0.8)), 20_000)
    return train_tokenizer((text for note in notes for text in (note.prompt, note.answer)), recipe.vocabulary)


@dataclass(frozen=True)
class Row:
    """One conversation: token ids, and for each whether it is the model's to say."""

    ids: list[int]
    said: list[bool]

    def __add__(self, other: Row) -> Row:
        return Row(self.ids + other.ids, self.said + other.said)


def encode(tokenizer: Tokenizer, note: Note) -> Row:
    """A note as the chat template writes it, without the leading begin token."""
    user, assistant, end = (SPECIAL.index(token) for token in (USER, ASSISTANT, EOS))
    asked = [user, *tokenizer.encode(note.prompt).ids, end, assistant]
    answered = [*tokenizer.encode(note.answer).ids, end]
    return Row(asked + answered, [False] * len(asked) + [True] * len(answered))


def openings(tokenizer: Tokenizer) -> list[list[int]]:
    """How a conversation begins: at once, or with a system prompt that changes nothing."""
    begin, system, end = (SPECIAL.index(token) for token in (BOS, SYSTEM, EOS))
    return [[begin], [begin, system, *tokenizer.encode(SYSTEM_PROMPT).ids, end]]


def rows(tokenizer: Tokenizer, recipe: Recipe) -> Iterator[Row]:
    """Conversations without end; a few have two turns.

    For a model from nothing short notes come first, to teach copying before reading.
    """
    rng = random.Random(recipe.seed)
    easy = stream(recipe.seed + 2, "train", style=dataclasses.replace(recipe.style, missing=0.6))
    full = stream(recipe.seed + 3, "train", style=recipe.style)
    begins = [Row(ids, [False] * len(ids)) for ids in openings(tokenizer)]
    short = 0 if recipe.grown_from else recipe.rows * recipe.warmup * 2
    for index in itertools.count():
        notes = easy if index < short else full
        row = begins[rng.random() < recipe.system_prompts] + encode(tokenizer, next(notes))
        yield row + encode(tokenizer, next(notes)) if rng.random() < recipe.two_turns else row


def batches(tokenizer: Tokenizer, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (ids, labels), both [rows, length], of rows of similar length; -100 labels what is not learned.

    Of several processes each gets its share of every batch.
    """
    rank, world = place()
    rng = random.Random(recipe.seed)
    source = rows(tokenizer, recipe)
    while True:
        pool = sorted(itertools.islice(source, recipe.rows * 16), key=lambda row: len(row.ids))
        chunks = [pool[i : i + recipe.rows] for i in range(0, len(pool), recipe.rows)]
        rng.shuffle(chunks)
        yield from (collate(chunk[rank::world]) for chunk in chunks)


def collate(chunk: list[Row]) -> tuple[Tensor, Tensor]:
    """Pad rows on the right to the longest one, rounded up to 8; the causal mask keeps padding out of sight."""
    length = -(-max(len(row.ids) for row in chunk) // 8) * 8
    ids = torch.full((len(chunk), length), SPECIAL.index(PAD))
    labels = torch.full((len(chunk), length), -100)
    for i, row in enumerate(chunk):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        said = torch.tensor(row.said)
        labels[i, : len(row.ids)][said] = ids[i, : len(row.ids)][said]
    return ids, labels


def loss_of(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the answers' tokens; the head runs on those positions only."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        logits = model.lm_head(hidden[targets != -100])
    return functional.cross_entropy(logits.float(), targets[targets != -100])


def matrices_of(model: LlamaForCausalLM) -> list[Tensor]:
    """The layers' matrices: everything of two dimensions but the embedding."""
    return [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for this process's share of the matrices, AdamW for embedding and norms."""
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            share(matrices_of(model)),
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_at(step: int, done: float, recipe: Recipe) -> float:
    """Share of the full learning rate: linear warm-up, cosine to a fiftieth at `done` = 1."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def progress(step: int, minutes: float, recipe: Recipe) -> float:
    """How much of the schedule is done, from 0 to 1: of its minutes where the recipe counts them, or its steps."""
    if recipe.minutes:
        return min(1.0, minutes / recipe.minutes)
    return min(1.0, max(0, step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))


@dataclass(frozen=True)
class Course:
    """What a training run took."""

    steps: int
    tokens: int
    minutes: float


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, recipe: Recipe, keep: Callable[[Course], None]) -> Course:
    """Run the schedule, calling `keep` every 200 steps; what it took in all."""
    model.set_attn_implementation(attention.NAME)
    model.model.compile(dynamic=True)
    steppers = optimizers(model, recipe)
    start, seen, mean, minutes = time.monotonic(), 0, 0.0, 0.0
    for step, (ids, labels) in enumerate(batches(tokenizer, recipe)):
        done = progress(step, minutes, recipe)
        last = done >= 1 if recipe.minutes else step == recipe.steps - 1
        rate = recipe.learning_rate * rate_at(step, done, recipe)
        loss, minutes = update(model, steppers, rate, ids, labels, start)
        seen += ids.numel() * place()[1]
        mean = loss if step == 0 else 0.95 * mean + 0.05 * loss
        if place()[0] == 0 and (step % 25 == 0 or last):
            speed = seen / minutes / 60
            print(f"step {step:5d}  loss {mean:.4f}  {speed:,.0f} tokens/s  {minutes:.1f} min", flush=True)
        if last:
            break
        if step % 200 == 199 and place()[0] == 0:
            keep(Course(step + 1, seen, minutes))
    return Course(step + 1, seen, minutes)


def update(
    model: LlamaForCausalLM,
    steppers: list[torch.optim.Optimizer],
    rate: float,
    ids: Tensor,
    labels: Tensor,
    start: float,
) -> tuple[float, float]:
    """One optimisation step; returns the batch's loss before it and the minutes since `start`."""
    loss = loss_of(model, ids, labels)
    loss.backward()
    numbers = average(model, [loss.item(), (time.monotonic() - start) / 60])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = rate
        stepper.step()
    model.zero_grad()
    exchange(matrices_of(model))
    return numbers[0], numbers[1]


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config, generation config and one `model.safetensors`, in bfloat16."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=160,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
    )
    rounded = LlamaForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = model.generation_config
    rounded.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def write_record(recipe: Recipe, course: Course, threads: int, folder: Path, earlier: Record | None) -> None:
    """Write `training.json`; where `earlier` was taken up again, it adds to that, kept under `resumed_from`."""
    before = earlier or {"steps": 0, "tokens": 0, "minutes": 0.0}
    record = {
        "recipe": dataclasses.asdict(recipe),
        "training_seed": recipe.seed,
        "steps": before["steps"] + course.steps,
        "rows": recipe.rows,
        "tokens": before["tokens"] + course.tokens,
        "minutes": before["minutes"] + course.minutes,
        "threads": threads,
    } | ({"resumed_from": earlier} if earlier else {})
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line; every number of the recipe can be overridden for an experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(RECIPES), default="s")
    parser.add_argument("--output", type=Path, help="folder to write (default: demo/NAME)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the folder's weights, where a training was stopped; another --seed draws other notes",
    )
    for field in dataclasses.fields(Recipe)[1:]:
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(option, type=type(field.default))
    return parser.parse_args()


def main() -> None:
    """Tokenizer, training, evaluation and model card in one command."""
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    names = [field.name for field in dataclasses.fields(Recipe)[1:]]
    changes = {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}
    recipe = dataclasses.replace(RECIPES[chosen.model], **changes)
    folder = chosen.output or ROOT / "demo" / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(recipe)
    earlier = json.loads((folder / "training.json").read_text(encoding="utf-8")) if chosen.resume else None
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) if chosen.resume else build(recipe)
    print(f"{recipe.name}: {model.num_parameters():,} parameters", flush=True)

    def keep(course: Course) -> None:
        save_tokenizer(tokenizer, folder, recipe.context)
        save(model, folder)
        write_record(recipe, course, chosen.threads * place()[1], folder, earlier)

    course = train(model, tokenizer, recipe, keep)
    if place()[0] > 0:
        return
    keep(course)
    print(field_table(write_all(folder)))


if __name__ == "__main__":
    main()
