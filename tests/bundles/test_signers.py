"""Signers: files and commands; what a command returns is checked before it is used."""

import subprocess
import sys
from pathlib import Path

import pytest

from bundles.format.errors import BundleError
from bundles.trust import keys
from bundles.trust.keys import load_public_key
from bundles.trust.signers import CommandSigner, FileSigner, load_signer, new_signer

_TRUST = Path(__file__).parents[2] / "docs" / "trust.md"


def _program(path: Path, body: str) -> str:
    """A command that runs `body` with the message in `message`, and writes `answer`."""
    path.write_text(f"import sys\nmessage = sys.stdin.buffer.read()\n{body}\nsys.stdout.buffer.write(answer)\n")
    return f"{sys.executable} -I '{path}'"


def _signing(tmp_path: Path, scheme: keys.Scheme) -> tuple[Path, Path, str]:
    """A key's file, its public half's, and a command that signs with it."""
    signer, private, public = new_signer(scheme), tmp_path / "it.key", tmp_path / "it.pub"
    keys.save_private_key(signer.private, private)
    public.write_text(keys.pem_of(signer.key.public_key))
    body = (
        "from cryptography.hazmat.primitives import hashes, serialization\n"
        "from cryptography.hazmat.primitives.asymmetric import ec\n"
        f"key = serialization.load_pem_private_key(open({str(private)!r}, 'rb').read(), None)\n"
        "size = getattr(getattr(key, 'curve', None), 'key_size', 0)\n"
        "used = {256: hashes.SHA256, 384: hashes.SHA384, 521: hashes.SHA512}.get(size)\n"
        "answer = key.sign(message, ec.ECDSA(used())) if used else key.sign(message)"
    )
    return private, public, _program(tmp_path / "sign here.py", body)


@pytest.mark.parametrize("scheme", ["ed25519", "ecdsa-sha2-nistp521", "ml-dsa-87/1"])
def test_a_command_signs_like_the_key_behind_it(tmp_path: Path, scheme: keys.Scheme) -> None:
    private, public, command = _signing(tmp_path, scheme)
    from_file, from_command = load_signer(str(private)), load_signer(command, public)
    assert isinstance(from_file, FileSigner)
    assert isinstance(from_command, CommandSigner)
    assert from_file.key == from_command.key == load_public_key(public)
    for signer in (from_file, from_command):
        assert signer.key.verifies(signer.sign(b"message"), b"message")


@pytest.mark.parametrize(
    "body",
    [
        "answer = b''",
        "answer = b'x' * 8193",
        "answer = b'x' * 64",
        "raise SystemExit(3)",
        "answer = b''\nprint('no card', file=sys.stderr)\nsys.exit(1)",
    ],
)
def test_a_command_that_gives_no_signature_of_the_key_signs_nothing(tmp_path: Path, body: str) -> None:
    signer = CommandSigner(_program(tmp_path / "bad.py", body), new_signer("ed25519").key)
    with pytest.raises(BundleError, match="SIGNER_FAILED"):
        signer.sign(b"message")


@pytest.mark.parametrize("command", ["", "'open", "/nonexistent/program"])
def test_a_command_that_cannot_be_run_is_named(command: str) -> None:
    with pytest.raises(BundleError, match="SIGNER_FAILED"):
        CommandSigner(command, new_signer("ed25519").key).sign(b"message")


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(BundleError, match="SIGNER_FAILED"):
        CommandSigner(f"true; touch {mark}", new_signer("ed25519").key).sign(b"message")
    assert not mark.exists()


def test_a_signature_by_another_key_is_not_used(tmp_path: Path) -> None:
    _, _, command = _signing(tmp_path, "ecdsa-sha2-nistp384")
    with pytest.raises(BundleError, match="SIGNER_FAILED"):
        CommandSigner(command, new_signer("ecdsa-sha2-nistp384").key).sign(b"message")


def _has_ml_dsa() -> bool:
    """Whether the `openssl` command knows ML-DSA: from 3.5 on."""
    words = ("openssl", "list", "-signature-algorithms")
    return "ML-DSA-87" in subprocess.run(words, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize(
    ("scheme", "command"),
    [
        ("ecdsa-sha2-nistp384", "openssl dgst -sha384 -sign {key}"),
        ("ecdsa-sha2-nistp384", "openssl pkeyutl -sign -rawin -digest sha384 -inkey {key} -in /dev/stdin"),
        ("ed25519", "openssl pkeyutl -sign -rawin -inkey {key} -in /dev/stdin"),
        ("ml-dsa-87/1", "openssl pkeyutl -sign -rawin -inkey {key} -in /dev/stdin"),
    ],
)
def test_openssl_signs_through_the_hook(tmp_path: Path, scheme: keys.Scheme, command: str) -> None:
    """The examples of docs/trust.md."""
    assert command.replace("{key}", "release.key") in _TRUST.read_text()
    if scheme.startswith("ml-dsa") and not _has_ml_dsa():
        pytest.skip("NOT RUN: needs OpenSSL 3.5")
    private, public, _ = _signing(tmp_path, scheme)
    signer = load_signer(command.format(key=private), public)
    assert signer.key.verifies(signer.sign(b"message"), b"message")


@pytest.mark.parametrize("content", ["", "no key", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_a_file_that_is_no_public_key_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    for name in ("key", "absent"):
        with pytest.raises(BundleError, match="KEY_UNREADABLE"):
            load_public_key(tmp_path / name)
