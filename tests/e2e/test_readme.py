"""What README.md says one can type works as it stands there, in a folder and a home of its own."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.e2e.appliance import ROOT

_SERVE = "cloister serve &"


def test_the_commands_under_by_hand_work_as_they_stand() -> None:
    """In a folder like the checkout; the port alone is another, because that one may be taken here."""
    (commands,) = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert _SERVE in commands
    commands = commands.replace(_SERVE, "cloister serve --listen 127.0.0.1:0 >serve.txt &")
    environment = {
        k: v for k, v in os.environ.items() if k not in ("USER", "CLOISTER_HOME", "CLOISTER_CREDENTIALS")
    }
    with tempfile.TemporaryDirectory(prefix="cl-", dir="/tmp") as folder:
        (Path(folder) / ".venv").symlink_to(Path(sys.prefix))
        (Path(folder) / "demo").symlink_to(ROOT / "demo")
        done = subprocess.run(
            ["bash", "-c", f"set -euxm\ntrap 'kill %1 2>/dev/null; wait' EXIT\n{commands}\nwait %1\ntrap - EXIT"],
            cwd=folder,
            env={**environment, "HOME": folder},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        said = (Path(folder) / "serve.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + said
    assert "verdict       intact" in done.stdout
    assert '"patient":"Julia Nguyen"' in done.stdout
    assert "ready on 127.0.0.1:" in said
    assert said.splitlines()[-1].startswith("control      stopped")
