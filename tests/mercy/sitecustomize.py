"""On PYTHONPATH, Python runs this as a process starts: watchdogs judge only the processes that a test names.

Tests give a watchdog little patience. On a busy machine that would hit the innocent, so here a process counts as
silent only once its id stands in the file $TEST_VICTIMS; all others the watchers believe to have just heard.
"""

import os
import sys
from pathlib import Path


def have_mercy() -> None:
    """Only who watches is changed, and before it takes the name."""
    import engine.process

    victims = Path(os.environ["TEST_VICTIMS"])

    class Merciful(engine.process.Silence):
        def is_too_long(self) -> bool:
            if not victims.exists() or str(self._pid) not in victims.read_text().split():
                self.heard()
            return super().is_too_long()

    engine.process.Silence = Merciful  # type: ignore[misc]  # a test's double takes the place of a class


if {"engine.host", "tests.faults.impatient"} & set(sys.orig_argv):
    have_mercy()
