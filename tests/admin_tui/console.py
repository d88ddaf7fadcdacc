"""The console in a real terminal on the fake appliance, for tests: python -m tests.admin_tui.console."""

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from admin_tui import launch

if TYPE_CHECKING:
    from tests.admin_tui.fake import Clock, FakePort


def main() -> int:
    found = launch.setting(sys.stdin, sys.stderr, os.environ)
    launch.prepare(found.ansi)
    from admin_tui.app import ConsoleApp
    from admin_tui.drain import TerminalDriver
    from tests.admin_tui.fake import GONE, Clock, FakePort, deployment, grow

    port, clock = FakePort(), Clock()
    failed = deployment("big", "failed")
    failed.reason, failed.message = "MODEL_DOES_NOT_FIT", "needs 9 GiB"
    port.answer.deployments.append(failed)
    port.failure = GONE if "gone" in sys.argv else None
    if "busy" in sys.argv:
        port.answer.deployments.pop()
        threading.Thread(target=_work, args=(port, clock, grow), daemon=True).start()
    app = ConsoleApp(
        port, "~/.cloister", ansi=found.ansi, utf8=found.utf8, now=clock.now, driver_class=TerminalDriver
    )
    app.run(mouse=False)
    return app.return_code or 0


def _work(port: "FakePort", clock: "Clock", grow: Callable[["FakePort", "Clock", int], None]) -> None:
    """Every counter moves, faster than the console asks."""
    for second in itertools.count():
        grow(port, clock, second)
        time.sleep(0.2)


if __name__ == "__main__":
    raise SystemExit(main())
