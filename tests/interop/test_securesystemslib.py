"""securesystemslib, the library under python-tuf, and our roots: each verifies what the other signed."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bundles.trust import roots
from bundles.trust.signers import new_signer
from tests.interop.conftest import run

_SCHEMES = ("ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ml-dsa-87/1")
_VERIFY = """
import json, sys
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import Key, Signature
document = json.load(open(sys.argv[1]))
message = encode_canonical(document["signed"]).encode()
for entry in document["signatures"]:
    key = Key.from_dict(entry["keyid"], dict(document["signed"]["keys"][entry["keyid"]]))
    key.verify_signature(Signature.from_dict(dict(entry)), message)
    print(key.scheme)
"""
_SIGN = """
import json, sys
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import CryptoSigner, SSlibKey
ed25519_key, ml_dsa_key = ed25519.Ed25519PrivateKey.generate(), mldsa.MLDSA87PrivateKey.generate()
private = [ed25519_key, ec.generate_private_key(ec.SECP256R1()), ml_dsa_key]
signers = [CryptoSigner(key, SSlibKey.from_crypto(key.public_key())) for key in private]
ids = [signer.public_key.keyid for signer in signers]
signed = {
    "_type": "root", "spec_version": "1.0.34", "version": 1, "expires": "2126-01-01T00:00:00Z",
    "consistent_snapshot": True,
    "keys": {signer.public_key.keyid: signer.public_key.to_dict() for signer in signers},
    "roles": {role: {"keyids": ids, "threshold": 2} for role in ("root", "release", "publisher")},
}
made = [signer.sign(encode_canonical(signed).encode()) for signer in signers[1:]]
signatures = [{"keyid": one.keyid, "sig": one.signature} for one in made]
json.dump({"signatures": signatures, "signed": signed}, open(sys.argv[1], "w"))
"""


def test_their_library_verifies_our_root(interop: Path, tmp_path: Path) -> None:
    signers = [new_signer(scheme) for scheme in _SCHEMES]
    held = {"root": [signer.key for signer in signers], "release": [signers[0].key], "publisher": [signers[1].key]}
    signed = roots.make(1, datetime.now(UTC) + timedelta(days=9), held, {"root": len(signers)})
    (tmp_path / "root.json").write_bytes(roots.sign_root(signed, signers))
    assert run(interop, "python", "-c", _VERIFY, tmp_path / "root.json").split() == list(_SCHEMES)


def test_a_root_that_their_library_signed_is_believed(interop: Path, tmp_path: Path) -> None:
    path = tmp_path / "root.json"
    run(interop, "python", "-c", _SIGN, path)
    root = roots.load(path)
    assert {key.scheme for key in root.role_keys("root")} == {"ed25519", "ecdsa-sha2-nistp256", "ml-dsa-87/1"}
    assert len(json.loads(path.read_text())["signatures"]) == root.roles["root"].threshold == 2
