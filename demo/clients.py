"""The demo's clients: a tenant's credentials, held-out notes answered over mutual TLS, tokens per second."""

import asyncio
import json

from appliance.client import Client
from benchmarks.demo_models.notes import Note, draw, score
from demo.scene import ALIAS, APPLICATION, TENANT, Demo
from demo.speed import measure

NOTES, BURST = 3, 16


def admit(demo: Demo) -> None:
    """A tenant, and credentials of one of its applications."""
    with demo.page.step("Add a tenant that may call this model, and issue its application a key"):
        demo.cloister("tenant", "add", TENANT, "--models", ALIAS, "--max-concurrent", str(2 * BURST))
        demo.cloister("key", "issue", "--tenant", TENANT, "--app", APPLICATION,
                      "--out", demo.path("credentials"))  # fmt: skip


def ask_values(demo: Demo) -> None:
    """The small model, on notes whose names, numbers and dates are new to it."""
    _ask(demo, "with values the model has never seen", draw(demo.seed, NOTES))


def ask_wording(demo: Demo) -> None:
    """The large model, on notes whose wording is new to it as well."""
    _ask(demo, "in wording the model has never seen", draw(demo.seed, NOTES, "unseen_templates"))


def _ask(demo: Demo, how: str, notes: list[Note]) -> None:
    """Notes answered over mutual TLS, each beside its gold record, mistakes and all."""
    with demo.page.step(f"Ask {len(notes)} notes {how}, over mutual TLS"):
        demo.page.line(f"  drawn with seed {demo.seed}; the same ones again: --seed {demo.seed}")
        right = total = 0
        with Client.from_dir(demo.machine.folder / "credentials") as client:
            for number, note in enumerate(notes, 1):
                demo.page.line()
                demo.page.rule(f"note {number} of {len(notes)}: {note.domain}")
                demo.page.paragraph(note.text)
                scored = _ask_one(demo, client, note)
                right, total = right + scored[0], total + scored[1]
        demo.page.line()
        demo.page.line(f"{right} of {total} fields right")


def _ask_one(demo: Demo, client: Client, note: Note) -> tuple[int, int]:
    """Show one answer as it streams, then field by field; right fields and all fields."""
    stream = client.chat(ALIAS, note.messages, temperature=0)
    with stream:
        text = demo.page.stream(stream)
    scores = score(note.gold, text)
    if scores.valid:
        demo.page.compare(json.loads(text), note.gold, scores.right)
    else:
        demo.page.line("  the answer is no JSON object: every field counts as wrong")
        demo.page.compare({}, note.gold, scores.right)
    first_ms = stream.completed.timings.time_to_first_token.total_seconds() * 1000
    demo.page.line(
        f"  {scores.correct} of {scores.total} right, {stream.usage.completion_tokens} tokens, "
        f"first after {first_ms:.0f} ms, audit record {stream.receipt.audit_sequence}"
    )
    return scores.correct, scores.total


def time_it(demo: Demo) -> None:
    """Tokens per second as a client sees them."""
    with demo.page.step("Measure: one stream alone, then a burst of streams at once"):
        notes = draw(demo.seed + 1, BURST)
        for drawn in (notes[:1], notes):
            speed = asyncio.run(measure(demo.machine.folder / "credentials", ALIAS, drawn))
            what = "stream " if speed.streams == 1 else "streams"
            demo.page.line(
                f"  {speed.streams:>2} {what} {speed.tokens:>6,} tokens in {speed.seconds:5.2f} s "
                f"= {speed.rate:>6,.0f} tokens/s"
            )
