"""The main job on one machine, start to end: a signed bundle in, answers out, every step shown with its time.

./install.sh --demo [--keep] [--seed N]
"""

import argparse
import asyncio
import json
import os
import pwd
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.cli.failure import describe
from appliance.cli.output import printable_text, size
from appliance.client import Client
from benchmarks.demo_models.notes import Note, draw, score
from demo.machine import ROOT, CommandError, Machine
from demo.page import Page
from demo.speed import measure

MODEL, ALIAS, TENANT, APPLICATION = "demo-notes-s", "notes", "ward-notes", "summary"
MODEL_FOLDER = ROOT / "demo" / MODEL
NOTES, BURST = 3, 16


@dataclass(frozen=True, slots=True)
class Demo:
    """One run: the page it is shown on, the machine it runs on, and what was asked for."""

    page: Page
    machine: Machine
    seed: int
    keep: bool

    def path(self, name: str) -> str:
        """A file of this demo, as one would type it."""
        return self.machine.shown(self.machine.folder / name)

    def cloister(self, *words: str, expect: int = 0, live: bool = False) -> str:
        """Show a command and run it; what it printed, with a refusal the line on standard error."""
        self.page.command(("cloister", *words))
        done = self.machine.run(words, expect, live)
        return (done.stderr if expect else done.stdout).strip()


def sign(demo: Demo) -> None:
    """Keys, and a bundle signed with them."""
    with demo.page.step("Make signing keys: a root of trust, a release key, a publisher key"):
        demo.cloister("trust", "init", "--out", demo.path("keys"))
    with demo.page.step("Build a bundle of the demo model and sign it"):
        bundle = demo.path("notes.bundle")
        model = demo.machine.shown(MODEL_FOLDER)
        demo.cloister("bundle", "build", "--model", model, "--name", MODEL, "--version", "1.0.0",
                      "--sequence", "1", "--out", bundle)  # fmt: skip
        demo.cloister("bundle", "sign", bundle, "--release-key", demo.path("keys/release.key"),
                      "--publisher-key", demo.path("keys/publisher.key"),
                      "--root", demo.path("keys/root.json"))  # fmt: skip
    with demo.page.step("Verify it as anyone with the root of trust can, without an appliance"):
        demo.cloister("bundle", "verify", bundle, "--root", demo.path("keys/root.json"))
        demo.page.good(
            f"signatures and all chunks hold, {size((demo.machine.folder / 'notes.bundle').stat().st_size)}"
        )


def start(demo: Demo) -> None:
    """A home directory, and the processes on it."""
    user = pwd.getpwuid(os.getuid()).pw_name
    with demo.page.step("Make the appliance's home, its certificate authority, its first operator"):
        demo.cloister("init", "--operator", f"alice={user}", "--site", "demo", "--profile", "demo",
                      "--root", demo.path("keys/root.json"))  # fmt: skip
    with demo.page.step("Start the processes and wait until each says READY"):
        words = ("serve", "--listen", "127.0.0.1:0")
        demo.page.command(("cloister", *words))
        lines = demo.machine.serve(words, demo.keep)
        for line in lines:
            if line.startswith("ready on"):
                demo.page.paragraph(line.replace(str(demo.machine.home), demo.machine.shown(demo.machine.home)))
            elif line.split()[1] == "ready":
                demo.page.line("  " + line)


def bring_in(demo: Demo) -> None:
    """A tampered copy of the bundle refused, the bundle itself imported, the model loaded."""
    with demo.page.step("Offer a copy of the bundle with one bit flipped among the weights"):
        tampered = demo.machine.folder / "tampered.bundle"
        where = flip_one_bit(demo.machine.folder / "notes.bundle", tampered)
        refusal = demo.cloister("bundle", "import", demo.path("tampered.bundle"), expect=3)
        demo.page.good(f"bit 0 of byte {where:,} is noticed; exit status 3, and this is said:")
        demo.page.paragraph(refusal.splitlines()[-1])
        tampered.unlink()
    with demo.page.step("Import the bundle itself: each byte verified before it is believed"):
        demo.page.line(demo.cloister("bundle", "import", demo.path("notes.bundle"), live=True))
    with demo.page.step("Load the model, bit for bit repeatable, and give clients a name for it"):
        demo.cloister("model", "load", MODEL, "--as", ALIAS, "--deterministic")
        demo.cloister("alias", "set", ALIAS, ALIAS)


def admit(demo: Demo) -> None:
    """A tenant, and credentials of one of its applications."""
    with demo.page.step("Add a tenant that may call this model, and issue its application a key"):
        demo.cloister("tenant", "add", TENANT, "--models", ALIAS, "--max-concurrent", str(2 * BURST))
        demo.cloister("key", "issue", "--tenant", TENANT, "--app", APPLICATION,
                      "--out", demo.path("credentials"))  # fmt: skip


def ask(demo: Demo) -> None:
    """Held-out notes answered over mutual TLS, each beside its gold record, mistakes and all."""
    with demo.page.step(f"Ask {NOTES} notes with values the model has never seen, over mutual TLS"):
        demo.page.line(f"  drawn with seed {demo.seed}; the same three again: --seed {demo.seed}")
        right = total = 0
        with Client.from_dir(demo.machine.folder / "credentials") as client:
            for number, note in enumerate(draw(demo.seed, NOTES), 1):
                demo.page.line()
                demo.page.rule(f"note {number} of {NOTES}: {note.domain}")
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


def audit(demo: Demo) -> None:
    """The log of all that, verified from its first record."""
    with demo.page.step("Verify the audit log, from its first record to its signed head"):
        demo.cloister("audit", "verify")
        verdict = json.loads(demo.machine.run(("audit", "verify", "--json")).stdout)
        demo.page.good(f"{verdict['size']} records intact, {verdict['open_intents']} requests without an outcome")


def stop(demo: Demo) -> None:
    """SIGTERM, and a look for anything left."""
    with demo.page.step("Stop: SIGTERM to `cloister serve`"):
        before = demo.machine.processes()
        status = demo.machine.stop()
        left = {pid: what for pid, what in demo.machine.processes().items() if pid in before or what != "cloister"}
        if status or left:
            raise CommandError(f"serve ended with exit status {status}; still running: {left or 'nothing'}")
        demo.page.good(f"exit status 0; none of the {len(before)} processes is left")


def try_next(demo: Demo) -> None:
    """What to type now."""
    demo.page.line("The appliance is up. Try:", indent="")
    demo.page.line()
    home, credentials = demo.machine.shown(demo.machine.home), demo.path("credentials")
    (note,) = draw(demo.seed + 1, 1, "unseen_values")
    (demo.machine.folder / "note.txt").write_text(note.prompt)
    for command in (
        f"export CLOISTER_HOME={home} PATH=.venv/bin:$PATH",
        "cloister status",
        "cloister doctor",
        f"cloister chat {ALIAS} --credentials {credentials} --stats --temperature 0 - < {demo.path('note.txt')}",
        f".venv/bin/python {credentials}/example.py",
        "cloister tenant list",
        "cloister audit tail -n 5",
        f"kill {demo.machine.server_pid}        # drains and ends everything",
    ):
        demo.page.line(command, indent="  ")


def flip_one_bit(source: Path, target: Path) -> int:
    """Copy a file with one bit changed three quarters in, where the weights lie; the byte's offset."""
    content = bytearray(source.read_bytes())
    where = len(content) * 3 // 4
    content[where] ^= 1
    target.write_bytes(content)
    return where


STEPS = (sign, start, bring_in, admit, ask, time_it, audit)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0, or 1 when a step failed."""
    parser = argparse.ArgumentParser(prog="./install.sh --demo", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the appliance running at the end")
    parser.add_argument("--seed", type=int, help="draws the notes; a new one each time when absent")
    args = parser.parse_args(argv)
    os.umask(0o077)
    began = time.monotonic()
    seed = secrets.randbelow(1_000_000) if args.seed is None else args.seed
    demo = Demo(Page(), Machine(), seed, args.keep)
    status = 1
    try:
        status = _steps(demo, began)
    except KeyboardInterrupt:
        print("\ninterrupted; stopping what runs", file=sys.stderr)
        status = 130
    except Exception as error:
        failed = describe(error)
        print(printable_text(f"\nerror: {failed.code}: {failed.message}"), file=sys.stderr)
        print(f"       logs of the processes: {demo.machine.home / 'logs'}", file=sys.stderr)
    finally:
        if status or not args.keep:
            demo.machine.stop()
        if not status and not args.keep:
            demo.machine.tidy()
    return status


def _steps(demo: Demo, began: float) -> int:
    where = demo.machine.shown(demo.machine.folder)
    lines = [f"everything is made fresh in {where}"]
    if demo.machine.elsewhere:
        lines.append("(not in this checkout, whose path is too long for Unix sockets: 107 bytes at most)")
    demo.page.title("Cloister: a signed model in, answers out", *lines)
    for step in STEPS:
        step(demo)
    if not demo.keep:
        stop(demo)
    demo.page.line("", indent="")
    demo.page.line(f"All of it worked, in {time.monotonic() - began:.1f} s.", indent="")
    if demo.keep:
        try_next(demo)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
