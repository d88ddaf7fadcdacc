"""Measure the demo models and write their cards and canaries: `python -m benchmarks.demo_models.evaluate`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.demo_models.answering import Answer, Model
from benchmarks.demo_models.notes import DOMAINS, KEYS, SPLITS, draw

DEMO = Path(__file__).parents[2] / "demo"
MODELS = tuple(sorted(folder.name.removeprefix("demo-notes-") for folder in DEMO.glob("demo-notes-*")))
SEED, COUNT = 1000, 600
CANARY_SEED = 2000
FIRST = "unseen_values, first wording"
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


def measure(model: Model, wide: bool, count: int = COUNT, seed: int = SEED) -> dict[str, Tally]:
    """A tally per split, `count` notes each, all from one seed.

    A model of `wide` wording is measured with it, and as `FIRST` on unseen values in the first wording alone.
    """
    tallies: dict[str, Tally] = {s: Tally.of(model.answer(draw(seed, count, s, wide=wide))) for s in SPLITS}
    return tallies | ({FIRST: Tally.of(model.answer(draw(seed, count)))} if wide else {})


def canaries(model: Model, wide: bool) -> list[dict[str, object]]:
    """Per domain, of sixteen held-out notes, the one answered in full that the model is surest of.

    The wide gap keeps the answer the same on any sound backend and precision.
    """
    chosen = []
    for domain in DOMAINS:
        answers = model.answer(draw(CANARY_SEED, 16, "unseen_values", domain, wide))
        answer = max((a for a in answers if a.scores.exact), key=lambda a: a.gap)
        chosen.append(
            {
                "messages": answer.note.messages,
                "match": "json",
                "expected": answer.text,
                "smallest_gap": round(answer.gap, 2),
            }
        )
    return chosen


def write_canaries(model: Model, wide: bool, folder: Path) -> None:
    """Write `canaries.json`: prompts, the greedy answers expected, the smallest top-2 gap in logits along each.

    Two of the three must be the same JSON values for an appliance to take the model as released.
    """
    page = {
        "command": COMMAND,
        "seed": CANARY_SEED,
        "decoding": {"temperature": 0, "max_tokens": 160},
        "pass_percent": 66,
        "canaries": canaries(model, wide),
    }
    (folder / "canaries.json").write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def field_table(tallies: dict[str, Tally]) -> str:
    """Markdown: accuracy by domain and field, one column per split."""
    lines = [_row("domain", "field", list(tallies)), "|---|---|" + "--:|" * len(tallies)]
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
    record = _record(folder)
    recipe = record["recipe"]
    page = _text("card.md").format(
        name=folder.name,
        model=_letter(folder),
        parameters=model.network.num_parameters(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        resumed=_resumed(folder, record) if "resumed_from" in record else "",
        origin=f"grown from {recipe['grown_from']}" if recipe.get("grown_from") else "trained from scratch",
        growth=_text("card-grown.md").format(**recipe) if recipe.get("grown_from") else "",
        wording=_text("card-wide.md").format(**recipe) if recipe.get("wide") else "",
        table=field_table(tallies),
        count=COUNT,
        seed=SEED,
        command=COMMAND,
        example=_example(folder),
        **{name: value for name, value in record.items() if name != "resumed_from"},
    )
    (folder / "README.md").write_text(page, encoding="utf-8")


def _resumed(folder: Path, record: dict[str, Any]) -> str:
    """How a training that was taken up again went on: the command, with all that it changed."""
    earlier = record["resumed_from"]
    changed = {name: value for name, value in record["recipe"].items() if value != earlier["recipe"][name]}
    options = "".join(f" --{name.replace('_', '-')} {value:g}" for name, value in changed.items())
    return _text("card-resumed.md").format(
        model=_letter(folder), options=options, planned=earlier["recipe"]["minutes"], **earlier
    )


def _letter(folder: Path) -> str:
    return folder.name.removeprefix("demo-notes-")


def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _example(folder: Path) -> str:
    first = json.loads((folder / "canaries.json").read_text(encoding="utf-8"))["canaries"][0]
    return f"{first['messages'][0]['content']}\n\n{first['expected']}"


def _record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return record


def write_all(folder: Path) -> dict[str, Tally]:
    """Measure the model of `folder`; write canaries and card there."""
    model = Model.load(folder)
    wide = bool(_record(folder)["recipe"].get("wide"))
    tallies = measure(model, wide)
    write_canaries(model, wide, folder)
    write_card(model, tallies, folder)
    return tallies


def main() -> None:
    """Measure, write, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=MODELS, help="one of the committed models (default: all of them)")
    which.add_argument("--folder", type=Path, help="any other folder that training wrote")
    chosen = parser.parse_args()
    models = [chosen.model] if chosen.model else MODELS
    for folder in [chosen.folder] if chosen.folder else [DEMO / f"demo-notes-{model}" for model in models]:
        print(f"{folder.name}\n\n{field_table(write_all(folder))}\n", flush=True)


if __name__ == "__main__":
    main()
