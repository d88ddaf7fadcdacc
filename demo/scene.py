"""One run of the demo: the page it is shown on, the machine it runs on, and what its steps share."""

import json
from dataclasses import dataclass
from typing import Any

from demo.machine import ROOT, Machine
from demo.page import Page

SMALL, LARGE = "demo-notes-s", "demo-notes-m"
ALIAS, TENANT, APPLICATION, SITE = "notes", "ward-notes", "summary", "demo"


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

    def model(self, name: str) -> str:
        """The folder of a demo model, as one would type it."""
        return self.machine.shown(ROOT / "demo" / name)

    def cloister(self, *words: str, expect: int = 0, live: bool = False) -> str:
        """Show a command and run it; what it printed, with a refusal the line on standard error."""
        self.page.command(("cloister", *words))
        done = self.machine.run(words, expect, live)
        return (done.stderr if expect else done.stdout).strip()

    def refused(self, *words: str) -> None:
        """Show a command that must be refused, and what it says; exit status 3."""
        refusal = self.cloister(*words, expect=3)
        self.page.good("refused, with exit status 3:")
        self.page.paragraph(refusal.splitlines()[-1])

    def facts(self, *words: str) -> Any:
        """What a command says as JSON; it is not shown."""
        return json.loads(self.machine.run((*words, "--json")).stdout)
