"""Nothing needs a network: from bundle to answer where there is only a loopback."""

import shutil
import subprocess
import sys

import pytest

from tests.e2e.appliance import ROOT

ALONE = ["unshare", "--map-root-user", "--net"]


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*ALONE, "true"], capture_output=True).returncode != 0,
    reason="NOT RUN: network namespaces are not allowed here",
)
def test_a_bundle_becomes_an_answer_where_there_is_no_network() -> None:
    done = subprocess.run(
        [*ALONE, sys.executable, "-m", "tests.e2e.alone"], cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
