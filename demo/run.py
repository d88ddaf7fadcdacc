"""The main job on one machine, start to end: signed bundles in, answers out, every step shown with its time.

./install.sh --demo [--keep] [--seed N]
"""

import argparse
import json
import os
import pwd
import secrets
import sys
import time
from collections.abc import Sequence

from appliance.cli.failure import describe
from appliance.cli.output import printable_text
from benchmarks.demo_models.notes import draw
from demo import carry_in, clients, release
from demo.machine import CommandError, Machine
from demo.page import Page
from demo.scene import ALIAS, SITE, Demo


def start(demo: Demo) -> None:
    """A home directory, and the processes on it."""
    user = pwd.getpwuid(os.getuid()).pw_name
    with demo.page.step("Make the appliance's home, its certificate authority, its first operator"):
        demo.cloister("init", "--operator", f"alice={user}", "--site", SITE, "--profile", "demo",
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
        f"cloister model rollback {ALIAS}",
        "cloister console",
        "cloister audit tail -n 5",
        f"kill {demo.machine.server_pid}        # drains and ends everything",
    ):
        demo.page.line(command, indent="  ")


STEPS = (
    release.make_keys,
    release.release_small,
    start,
    carry_in.refuse,
    carry_in.bring_in_small,
    clients.admit,
    clients.ask_values,
    release.lose_a_key,
    release.release_large,
    carry_in.bring_in_large,
    clients.ask_wording,
    clients.time_it,
    audit,
)


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
    demo.page.title("Cloister: signed models in, answers out", *lines)
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
