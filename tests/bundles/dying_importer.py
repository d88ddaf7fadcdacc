"""The importer process, with the tests' inspector and a record of every chunk; it can be killed at one of those.

    dying_importer.py --home DIR

With DYING_AT=N in the environment SIGKILL comes right behind the N-th record of what is staged.
"""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from bundles.importer.__main__ import main
from bundles.importer.ledger import Ledger
from bundles.importer.workplace import Workplace
from tests.bundles.making import CHUNK, INSPECTOR

_open, _stage = Workplace.open, Ledger.stage
_left = int(os.environ.get("DYING_AT", "0"))


def _opened(home: Path, **given: Any) -> Workplace:
    return _open(home, INSPECTOR, interval=CHUNK, **given)


def _staged(ledger: Ledger, model_digest: str, sizes: Mapping[int, int]) -> None:
    global _left
    _stage(ledger, model_digest, sizes)
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    with mock.patch.object(Workplace, "open", _opened), mock.patch.object(Ledger, "stage", _staged):
        raise SystemExit(main())
