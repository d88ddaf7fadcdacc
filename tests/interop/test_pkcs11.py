"""A key that never leaves its token, through --sign-with and pkcs11-tool: the example of docs/trust.md."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from bundles.trust import keys
from bundles.trust.signers import load_signer

_MODULES = [Path(folder) / "softhsm" / "libsofthsm2.so" for folder in ("/usr/lib", "/usr/lib64", "/usr/local/lib")]
_MODULE = next((path for path in _MODULES if path.exists()), None)
_SCRIPT = """#!/bin/sh
openssl dgst -sha384 -binary |
  pkcs11-tool --module {module} --login --pin 1234 --sign --id 01 --mechanism ECDSA --signature-format openssl
"""

pytestmark = pytest.mark.skipif(
    _MODULE is None or not shutil.which("pkcs11-tool") or not shutil.which("softhsm2-util"),
    reason="NOT RUN: needs softhsm2 and opensc (apt install softhsm2 opensc)",
)


def _tool(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _generate() -> ec.EllipticCurvePublicKey:
    _tool("softhsm2-util", "--init-token", "--free", "--label", "t", "--so-pin", "1234", "--pin", "1234")
    words = ("--login", "--pin", "1234", "--keypairgen", "--key-type", "EC:secp384r1", "--id", "01")
    told = _tool("pkcs11-tool", "--module", str(_MODULE), *words)
    found = re.search(r"EC_POINT:\s+(?:0461)?(04[0-9a-f]{192})", told)
    assert found, told
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), bytes.fromhex(found[1]))


def test_a_token_signs_through_the_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    monkeypatch.setitem(os.environ, "SOFTHSM2_CONF", str(tmp_path / "conf"))
    public, script = tmp_path / "it.pub", tmp_path / "sign-with-card"
    public.write_text(keys.pem_of(_generate()))
    script.write_text(_SCRIPT.format(module=_MODULE))
    script.chmod(0o700)
    signer = load_signer(str(script), public)
    assert signer.key.verifies(signer.sign(b"message" * 1000), b"message" * 1000)
