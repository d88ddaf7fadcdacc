"""The console in real terminals: each kind of them on the fake appliance, and the whole of it on a running one."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.admin_tui.tmux import Terminal, needs_tmux, terminal
from tests.e2e.appliance import (
    ALIAS,
    CLOISTER,
    DEMO_MODEL,
    Appliance,
    build_bundle,
    other_weights,
    running_appliance,
)

pytestmark = needs_tmux
FAKE = [sys.executable, "-m", "tests.admin_tui.console"]
_SGR = re.compile(r"\x1b\[([0-9;]*)m")


@pytest.mark.parametrize(
    ("term", "no_color"),
    [*((t, False) for t in ("tmux-256color", "screen", "linux", "vt100")), ("screen", True), ("linux", True)],
)
def test_every_terminal_shows_every_page_in_colours_one_can_read(term: str, no_color: bool) -> None:
    environ = {"NO_COLOR": "1"} if no_color else {}
    with terminal(FAKE, environ, term) as pane:
        for key, words in (("1", "MODEL_DOES_NOT_FIT"), ("2", "12,345"), ("3", "7cceb7f40160"), ("5", "of 250")):
            pane.type(key)
            text = pane.until(words)
            painted = pane.attributes()
            assert contrast(painted) == [], painted
            if term in ("linux", "vt100"):
                assert text.isascii()
            if no_color:
                assert colours(painted) <= {"default"}
        pane.type("q")
        pane.until("ended with 0")


def test_truecolour_can_be_read_too() -> None:
    with terminal(FAKE, {"COLORTERM": "truecolor"}) as pane:
        pane.until("MODEL_DOES_NOT_FIT")
        painted = pane.attributes()
        assert contrast(painted) == []
        assert len(colours(painted)) > 3


def test_quitting_restores_the_terminal_also_when_control_is_gone() -> None:
    with terminal([*FAKE, "gone"]) as pane:
        pane.until("NOT REACHABLE, trying again")
        pane.type("q")
        text = pane.until("ended with 0")
        assert "CLOISTER" not in text
        pane.paste("echoed again")
        pane.until("echoed again")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_ends_the_process(number: signal.Signals) -> None:
    with terminal(FAKE) as pane:
        pane.until("MODEL_DOES_NOT_FIT")
        (console,) = children(pane.pid())
        os.kill(console, number)
        pane.until("ended with")
        assert not Path(f"/proc/{console}").exists()


def test_a_lost_terminal_leaves_no_process() -> None:
    with terminal(FAKE) as pane:
        pane.until("MODEL_DOES_NOT_FIT")
        (console,) = children(pane.pid())
        pane.hang_up()
        end = time.monotonic() + 30
        while Path(f"/proc/{console}/cmdline").exists() and Path(f"/proc/{console}/cmdline").read_bytes():
            assert time.monotonic() < end, "the console outlived its terminal"
            time.sleep(0.05)


def test_a_small_terminal_says_what_it_needs() -> None:
    with terminal(FAKE, size=(60, 20)) as pane:
        pane.until("need 80x24")
        pane.type("3", "q")
        pane.until("ended with 0")


def test_a_dumb_terminal_gets_the_names_of_the_commands() -> None:
    with terminal([str(CLOISTER), "console"], term="dumb") as pane:
        pane.until("NO_TERMINAL")
        pane.until("ended with 2")


@pytest.fixture(scope="module")
def appliance() -> Iterator[Appliance]:
    with running_appliance() as running:
        yield running


@contextlib.contextmanager
def console(appliance: Appliance) -> Iterator[Terminal]:
    with terminal([str(CLOISTER), "--home", str(appliance.home), "console"]) as pane:
        pane.until(r"CLOISTER  GATEWAY OK")
        yield pane


def test_the_running_appliance_is_seen_its_pages_switch_and_its_log_is_verified(appliance: Appliance) -> None:
    with console(appliance) as pane:
        pane.until(rf"{ALIAS} +OK ready +(native|torch)")
        pane.until(r"ward-notes +OK active")
        pane.type("2", "Enter")
        pane.until(r"key active +summary")
        pane.type("3")
        pane.until(rf"demo-notes-s@1.0.1 .* OK ready {ALIAS}")
        pane.type("5")
        pane.until(r"\d+\.\.\d+ of \d+")
        pane.until(r"operator\.change")
        pane.type("v")
        verdict = pane.until(r"OK INTACT 1\.\.\d+")
        assert "NOT INTACT" not in verdict
        pane.type("q")
        pane.until("ended with 0")


def test_what_a_tenant_does_is_counted_while_one_looks(appliance: Appliance) -> None:
    with console(appliance) as pane, appliance.client() as client:
        pane.until(r"ward-notes +OK active")
        stream = client.generate(ALIAS, text="hello", temperature=0, ignore_eos=True, max_tokens=40)
        list(stream)
        spent = stream.usage.prompt_tokens + stream.usage.completion_tokens
        used = next(t["tokens_used"] for t in appliance.json("tenant", "list") if t["name"] == "ward-notes")
        assert used >= spent
        pane.until(rf"ward-notes +OK active +0/\d+ +{used:,} +0 ")


def test_an_import_is_watched_from_its_beginning_to_its_end(appliance: Appliance, tmp_path: Path) -> None:
    """The importer stands still when the import begins, so that there is something to see; then it goes on."""
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model)
    bundle = build_bundle(appliance.home.parent, model, sequence=2)
    (importer,) = processes(appliance, "bundles.importer")
    with console(appliance) as pane:
        pane.type("3")
        pane.until("demo-notes-s@1.0.1")
        pane.type("I")
        pane.until("Import a bundle")
        pane.paste(str(bundle))
        pane.type("Enter")
        pane.until("Import this bundle[?]")
        pane.type("Tab")
        pane.until(r"\[ Import \]")
        os.kill(importer, signal.SIGSTOP)
        try:
            pane.type("Enter")
            pane.until(rf"IMPORT {re.escape(str(bundle))}\s")
        finally:
            os.kill(importer, signal.SIGCONT)
        pane.until(r"OK committed demo-notes-s@1.0.2, 3.6 MiB verified")
        pane.until(r"demo-notes-s@1.0.2 +2 ")
        pane.type("q")
        pane.until("ended with 0")


def test_a_tampered_bundle_is_rejected_with_its_code(appliance: Appliance) -> None:
    tampered = build_bundle(appliance.home.parent, other_weights(appliance.home.parent), sequence=3)
    content = bytearray(tampered.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    tampered.write_bytes(content)
    code = json.loads(
        appliance.cloister("--json", "bundle", "import", str(tampered), expect=3).stderr.splitlines()[-1]
    )
    with console(appliance) as pane:
        pane.type("3")
        pane.until("demo-notes-s@1.0.1")
        pane.type("I")
        pane.until("Import a bundle")
        pane.paste(str(tampered))
        pane.type("Enter")
        pane.until("Import this bundle[?]")
        pane.type("Right", "Enter")
        pane.until(f"CRIT REJECTED {code['error']['code']}")


def test_a_console_finds_control_again_after_it_was_killed(appliance: Appliance) -> None:
    with console(appliance) as pane:
        (control,) = processes(appliance, "appliance.control")
        os.kill(control, signal.SIGSTOP)
        try:
            pane.until("NOT REACHABLE, trying again")
        finally:
            os.kill(control, signal.SIGKILL)
        pane.until(r"CLOISTER  GATEWAY OK")
        pane.type("q")
        pane.until("ended with 0")


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def processes(appliance: Appliance, module: str) -> list[int]:
    """Process ids of this appliance that run `module`."""
    done = subprocess.run(
        ["pgrep", "-f", f"{module} .*{appliance.home}"], capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


def cells(painted: str) -> Iterator[tuple[str, str, str]]:
    """(character, foreground, background) of every cell with something to read."""
    for line in painted.splitlines():
        fore, back, swapped, at = "default", "default", False, 0
        for match in [*_SGR.finditer(line), None]:
            for character in line[at : match.start() if match else None]:
                if not character.isspace():
                    yield (character, back, fore) if swapped else (character, fore, back)
            if match is None:
                break
            at = match.end()
            fore, back, swapped = _after(match[1], fore, back, swapped)


def _after(codes: str, fore: str, back: str, swapped: bool) -> tuple[str, str, bool]:
    """Colours after one SGR sequence (ECMA-48)."""
    words = [int(word or 0) for word in codes.split(";")]
    while words:
        code = words.pop(0)
        if code in (38, 48):
            count = 2 if words[0] == 5 else 4
            colour = str(words[:count])
            del words[:count]
            fore, back = (colour, back) if code == 38 else (fore, colour)
        elif code == 0:
            fore, back, swapped = "default", "default", False
        elif code in (7, 27):
            swapped = code == 7
        elif 30 <= code <= 37 or 90 <= code <= 97:
            fore = str(code % 10 + (8 if code >= 90 else 0))
        elif 40 <= code <= 47 or 100 <= code <= 107:
            back = str(code % 10 + (8 if code >= 100 else 0))
        elif code in (39, 49):
            fore, back = ("default", back) if code == 39 else (fore, "default")
    return fore, back, swapped


def contrast(painted: str) -> list[str]:
    """Characters in the colour of their background; where both are the terminal's own, it tells them apart."""
    return [c for c, fore, back in cells(painted) if fore == back != "default"]


def colours(painted: str) -> set[str]:
    """Every colour used."""
    return {colour for _, *pair in cells(painted) for colour in pair}


def test_the_check_of_contrast_finds_black_on_black() -> None:
    assert contrast("\x1b[30;40mx\x1b[0m") == ["x"]
    assert contrast("\x1b[38;5;1;48;5;1mx") == ["x"]
    assert contrast("\x1b[31;40mx \x1b[7my\x1b[0mz") == []
