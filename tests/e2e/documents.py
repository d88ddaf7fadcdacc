"""The blocks of code in a page of documentation, and running them as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.e2e.appliance import ROOT


def blocks(page: str, language: str) -> list[str]:
    """The blocks of one language in a page, in order; "" for those that name none."""
    text = (ROOT / page).read_text()
    return [code for tag, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if tag == language]


def typed(commands: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run commands in bash as somebody would type them in `folder`; the first that fails ends it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("USER", "CLOISTER_HOME", "CLOISTER_CREDENTIALS")}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return subprocess.run(
        ["bash", "-c", f"set -eux\n{commands}"],
        cwd=folder,
        env={**kept, "HOME": str(folder), "PATH": path, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
