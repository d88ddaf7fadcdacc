"""The offline authority, API keys and secret keys."""

import datetime
import ipaddress
import re
import shutil
import stat
import subprocess
import zlib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store

from appliance.control.identity import api_keys
from appliance.control.identity.api_keys import PresentedKey
from appliance.control.identity.authority import Authority, identity_of
from appliance.control.identity.secret_keys import SecretKeys
from appliance.errors import CloisterError
from tests.appliance.control_house import csr

WEEK = datetime.timedelta(days=7)
IDENTITY = identity_of("test", "ward", "summary")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path, "test")


@pytest.fixture
def keys(tmp_path: Path) -> SecretKeys:
    return SecretKeys.create(tmp_path)


def root(authority: Authority) -> x509.Certificate:
    return x509.load_pem_x509_certificate(authority.certificate_pem)


def test_a_client_certificate_has_one_uri_san_is_for_clients_and_chains_to_the_root(authority: Authority) -> None:
    certificate = authority.issue_client(csr(), IDENTITY, WEEK)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [type(n) for n in names] == [x509.UniformResourceIdentifier]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [IDENTITY]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    verifier = PolicyBuilder().store(Store([root(authority)])).build_client_verifier()
    assert verifier.verify(certificate, []).chain[-1] == root(authority)


def test_the_servers_certificate_holds_for_every_name_it_is_reached_by(authority: Authority) -> None:
    server = authority.issue_server(["localhost", "127.0.0.1", "::1", "box.site", "localhost"])
    certificate = x509.load_pem_x509_certificate(server.certificate_pem)
    for name in (
        x509.DNSName("localhost"),
        x509.DNSName("box.site"),
        x509.IPAddress(ipaddress.IPv4Address("127.0.0.1")),
    ):
        verifier = PolicyBuilder().store(Store([root(authority)])).build_server_verifier(name)
        assert verifier.verify(certificate, [])
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_what_a_request_asks_for_besides_its_key_is_ignored(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity_of("test", "other", "x"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    certificate = authority.issue_client(request, IDENTITY, WEEK)
    assert "root" not in certificate.subject.rfc4514_string()
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [IDENTITY]
    assert certificate.public_key() == key.public_key()


def _with_another_signature() -> bytes:
    first, second = (x509.load_pem_x509_csr(csr()) for _ in range(2))
    der = first.public_bytes(serialization.Encoding.DER)
    start = der.index(first.signature)
    forged = bytearray(der)
    forged[start + 10] ^= 1
    assert second.signature != first.signature
    return x509.load_der_x509_csr(bytes(forged)).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "request_pem",
    [b"", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", csr(ec.SECP384R1()),
     b"x" * 20_000, _with_another_signature()],
    ids=["empty", "broken", "other curve", "too long", "not its own signature"],
)  # fmt: skip
def test_a_request_that_proves_nothing_is_refused(authority: Authority, request_pem: bytes) -> None:
    with pytest.raises(CloisterError, match="INVALID_CSR"):
        authority.issue_client(request_pem, IDENTITY, WEEK)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="NOT RUN: no openssl command here")
def test_openssl_verifies_a_client_for_clients_only(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "c.pem").write_bytes(
        authority.issue_client(csr(), IDENTITY, WEEK).public_bytes(serialization.Encoding.PEM)
    )
    for purpose, status in (("sslclient", 0), ("sslserver", 2)):
        done = subprocess.run(
            ["openssl", "verify", "-purpose", purpose, "-CAfile", tmp_path / "ca.pem", tmp_path / "c.pem"],
            capture_output=True,
        )
        assert done.returncode == status, done


def test_keys_are_files_that_only_their_owner_reads_and_repr_shows_none(keys: SecretKeys, tmp_path: Path) -> None:
    files = list(tmp_path.glob("*.key"))
    assert len(files) == 3
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_bytes().hex() not in repr(keys)
    assert repr(keys.cache) not in repr(keys)


def test_a_key_file_of_the_wrong_size_is_refused(keys: SecretKeys, tmp_path: Path) -> None:
    (tmp_path / "cache-salt.key").write_bytes(b"short")
    with pytest.raises(ValueError, match="restore"):
        SecretKeys.load(tmp_path)


def test_an_api_key_has_its_form_and_matches_only_its_own_secret(keys: SecretKeys) -> None:
    drawn, other = api_keys.draw(keys), api_keys.draw(keys)
    assert re.fullmatch(r"clo_[0-9a-f]{12}_[a-z2-7]{52}_[0-9a-f]{8}", drawn.text)
    presented = PresentedKey.parse(drawn.text)
    assert presented.key_id == drawn.key_id
    assert presented.matches(drawn.mac, keys)
    assert not presented.matches(other.mac, keys)
    assert not presented.matches(None, keys)
    assert drawn.text not in repr(drawn)
    assert presented.secret not in repr(presented)
    assert presented.secret.encode() not in drawn.mac


def test_a_damaged_api_key_has_an_id_that_nobody_has(keys: SecretKeys) -> None:
    text = api_keys.draw(keys).text
    last = "0" if text[-1] != "0" else "1"
    for damaged in (text[:-1], text.upper(), text.replace("clo_", "cla_"), text[:-1] + last, "", "clo_nobody_x_0"):
        assert PresentedKey.parse(damaged).key_id == ""


def test_even_a_key_of_zeros_does_not_match_the_stand_in_for_unknown_keys(keys: SecretKeys) -> None:
    body = f"clo_{'0' * 12}_{'a' * 52}"
    presented = PresentedKey.parse(f"{body}_{zlib.crc32(body.encode()):08x}")
    assert presented.key_id == "0" * 12
    assert not presented.matches(None, keys)
