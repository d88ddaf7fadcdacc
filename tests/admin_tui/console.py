"""The console in a real terminal on the fake appliance, for tests: python -m tests.admin_tui.console."""

import os
import sys

from admin_tui import launch


def main() -> int:
    found = launch.setting(sys.stdin, sys.stderr, os.environ)
    launch.prepare(found.ansi)
    from admin_tui.app import ConsoleApp
    from admin_tui.drain import TerminalDriver
    from tests.admin_tui.fake import GONE, Clock, FakePort, deployment

    port, clock = FakePort(), Clock()
    failed = deployment("big", "failed")
    failed.reason, failed.message = "MODEL_DOES_NOT_FIT", "needs 9 GiB"
    port.answer.deployments.append(failed)
    port.failure = GONE if "gone" in sys.argv else None
    app = ConsoleApp(
        port, "~/.cloister", ansi=found.ansi, utf8=found.utf8, now=clock.now, driver_class=TerminalDriver
    )
    app.run(mouse=False)
    return app.return_code or 0


if __name__ == "__main__":
    raise SystemExit(main())
