"""Measure a demo model and write its card and canaries: `python -m benchmarks.demo_models.evaluate`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.demo_models.answering import Answer, Model
from benchmarks.demo_models.notes import DOMAINS, KEYS, SPLITS, draw

ROOT = Path(__file__).parents[2]
SEED, COUNT = 1000, 600
CANARY_SEED = 2000
COMMAND = "python -m benchmarks.demo_models.evaluate"


@dataclass(frozen=True)
class Tally:
    """Right and asked fields by (domain, key), and the share of notes right in full."""

    right: Counter[tuple[str, str]]
    asked: Counter[tuple[str, str]]
    exact: float

    @classmethod
    def of(cls, answers: list[Answer]) -> Tally:
        """Count the answers of one split."""
        right: Counter[tuple[str, str]] = Counter()
        asked: Counter[tuple[str, str]] = Counter()
        for answer in answers:
            for key, correct in answer.scores.right.items():
                asked[answer.note.domain, key] += 1
                right[answer.note.domain, key] += correct
        return cls(right, asked, sum(a.scores.exact for a in answers) / len(answers))

    def share(self, domain: str | None = None, key: str | None = None) -> float:
        """The share of fields right, of one domain and field or of all."""
        wanted = [pair for pair in self.asked if domain in (None, pair[0]) and key in (None, pair[1])]
        return sum(self.right[p] for p in wanted) / sum(self.asked[p] for p in wanted)


def measure(model: Model, count: int = COUNT, seed: int = SEED) -> dict[str, Tally]:
    """A tally per split, `count` notes each, all from one seed."""
    return {split: Tally.of(model.answer(draw(seed, count, split))) for split in SPLITS}


def canaries(model: Model) -> list[dict[str, object]]:
    """Per domain, of sixteen held-out notes, the one answered in full that the model is surest of.

    The wide gap keeps the answer the same on any sound backend and precision.
    """
    chosen = []
    for domain in DOMAINS:
        answers = model.answer(draw(CANARY_SEED, 16, "unseen_values", domain))
        answer = max((a for a in answers if a.scores.exact), key=lambda a: a.gap)
        chosen.append(
            {"messages": answer.note.messages, "expected": answer.text, "smallest_gap": round(answer.gap, 2)}
        )
    return chosen


def write_canaries(model: Model, folder: Path) -> None:
    """Write `canaries.json`: prompts, the greedy answers expected, the smallest top-2 gap in logits along each."""
    page = {
        "command": COMMAND,
        "seed": CANARY_SEED,
        "decoding": {"temperature": 0, "max_tokens": 160},
        "canaries": canaries(model),
    }
    (folder / "canaries.json").write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def field_table(tallies: dict[str, Tally]) -> str:
    """Markdown: accuracy by domain and field, one column per split."""
    lines = [_row("domain", "field", SPLITS), "|---|---|" + "--:|" * len(SPLITS)]
    for domain in DOMAINS:
        for key in KEYS[domain]:
            lines += [_row(domain, key, [f"{tally.share(domain, key):.1%}" for tally in tallies.values()])]
        lines += [_row(f"**{domain}**", "all", [f"**{tally.share(domain):.1%}**" for tally in tallies.values()])]
    lines += [_row("**all**", "all", [f"**{tally.share():.1%}**" for tally in tallies.values()])]
    lines += [_row("notes right in full", "", [f"{tally.exact:.1%}" for tally in tallies.values()])]
    return "\n".join(lines)


def _row(domain: str, field: str, cells: Sequence[str]) -> str:
    return f"| {domain} | {field} | " + " | ".join(cells) + " |"


def write_card(model: Model, tallies: dict[str, Tally], folder: Path) -> None:
    """Write the model card, every number of it just measured."""
    config = model.network.config
    page = (
        (Path(__file__).parent / "card.md")
        .read_text(encoding="utf-8")
        .format(
            name=folder.name,
            parameters=model.network.num_parameters(),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            table=field_table(tallies),
            count=COUNT,
            seed=SEED,
            command=COMMAND,
            example=_example(folder),
            **_training(folder),
        )
    )
    (folder / "README.md").write_text(page, encoding="utf-8")


def _example(folder: Path) -> str:
    first = json.loads((folder / "canaries.json").read_text(encoding="utf-8"))["canaries"][0]
    return f"{first['messages'][0]['content']}\n\n{first['expected']}"


def _training(folder: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return record


def write_all(folder: Path) -> dict[str, Tally]:
    """Measure the model of `folder`; write canaries and card there."""
    model = Model.load(folder)
    tallies = measure(model)
    write_canaries(model, folder)
    write_card(model, tallies, folder)
    return tallies


def main() -> None:
    """Measure, write, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, default=ROOT / "demo" / "demo-notes-s", help="default: demo/demo-notes-s"
    )
    print(field_table(write_all(parser.parse_args().folder)))


if __name__ == "__main__":
    main()
