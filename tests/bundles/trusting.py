"""Makes what the tests of trust need: roots over given keys, certificate authorities, their leaves and lists."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bundles.format import manifest as manifests
from bundles.format.manifest import File, Manifest
from bundles.trust import dsse, oms, roots
from bundles.trust import revocation as revoking
from bundles.trust.extension import Extension
from bundles.trust.keys import Key
from bundles.trust.policy import Head
from bundles.trust.revocation import Revocations
from bundles.trust.roots import Root
from bundles.trust.signers import PrivateSigner, Signer, new_signer
from tests.bundles.making import sha256

NOW = datetime.now(UTC).replace(microsecond=0)  # what is signed here is judged by the clock, too
DAY = timedelta(days=1)
ROOT_KEY, RELEASE_KEY, REVOCATION_KEY = (new_signer("ed25519") for _ in range(3))


def root_of(
    roles: Mapping[str, Sequence[Key]],
    *,
    version: int = 1,
    thresholds: Mapping[str, int] | None = None,
    extension: Extension | None = None,
    signers: Sequence[Signer] = (ROOT_KEY,),
    expires: datetime = NOW + 365 * DAY,
) -> Root:
    """A root with these roles, and keys of its own for root, release, publisher and revocation where not given."""
    held = {
        "root": [ROOT_KEY.key],
        "release": [RELEASE_KEY.key],
        "publisher": [new_signer("ecdsa-sha2-nistp384").key],
        "revocation": [REVOCATION_KEY.key],
    }
    signed = roots.make(version, expires, {**held, **roles}, thresholds or {}, extension)
    return roots.parse(roots.sign_root(signed, signers))


def revocations(sequence: int = 1, signers: Sequence[Signer] = (REVOCATION_KEY,), **fields: object) -> Revocations:
    """A revocation document of yesterday, for a month."""
    times = {"issued_at": NOW - DAY, "expires": NOW + 30 * DAY}
    document = revoking.make(sequence, **{**times, **fields})  # type: ignore[arg-type]  # of the tests' own making
    return revoking.parse(revoking.sign(document, signers))


@dataclass(frozen=True)
class Authority:
    """A certificate authority; the one that signed itself, or one below another."""

    certificate: x509.Certificate
    private: ec.EllipticCurvePrivateKey

    @classmethod
    def new(
        cls,
        name: str = "Ward CA",
        issuer: "Authority | None" = None,
        crl_sign: bool = True,
        purposes: Sequence[x509.ObjectIdentifier] = (),
        ends: datetime = NOW + 99 * DAY,
    ) -> "Authority":
        private = ec.generate_private_key(ec.SECP384R1())
        above = issuer.certificate.subject if issuer else _name(name)
        builder = _builder(name, above, private.public_key(), ends=ends)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=crl_sign), critical=True)
        if purposes:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        return cls(_signed(builder, issuer.private if issuer else private), private)

    def leaf(
        self,
        key: Key,
        *,
        begins: datetime = NOW - 30 * DAY,
        ends: datetime = NOW + 30 * DAY,
        purposes: Sequence[x509.ObjectIdentifier] = (ExtendedKeyUsageOID.CODE_SIGNING,),
        is_ca: bool = False,
        signs: bool = True,
        critical: x509.ObjectIdentifier | None = None,
    ) -> x509.Certificate:
        builder = _builder("Publisher", self.certificate.subject, key.public_key, begins, ends)
        builder = builder.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        builder = builder.add_extension(_usage(key_cert_sign=is_ca, signs=signs), critical=True)
        if purposes:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        if critical:
            builder = builder.add_extension(x509.UnrecognizedExtension(critical, b"\x05\x00"), critical=True)
        return _signed(builder, self.private)

    def crl(
        self,
        *serials: int,
        issued: datetime = NOW - DAY,
        due: datetime = NOW + 30 * DAY,
        private: ec.EllipticCurvePrivateKey | None = None,
        is_delta: bool = False,
    ) -> bytes:
        """DER of a list with these serial numbers."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
        builder = builder.last_update(issued).next_update(due)
        if is_delta:
            builder = builder.add_extension(x509.DeltaCRLIndicator(1), critical=True)
        for serial in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(issued).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(private or self.private, hashes.SHA384()).public_bytes(Encoding.DER)


def certified(*authorities: Authority, crl_required: bool = False, role: str = "publisher") -> Extension:
    """What a root says of authorities of publishers."""
    return Extension(
        authorities={role: tuple(authority.certificate for authority in authorities)},
        crl_required=frozenset({role} if crl_required else ()),
    )


def publisher_signer() -> PrivateSigner:
    """A publisher's key."""
    return new_signer("ecdsa-sha2-nistp384")


_MODEL = {
    "architecture": "LlamaForCausalLM",
    "dtype": "float16",
    "quantisation": None,
    "max_context_tokens": 8,
    "parameters": 1,
    "capabilities": (),
    "tokenizer_sha256": None,
}


def manifest_of(**changes: object) -> Manifest:
    """The manifest of a model of one file, with `changes`."""
    content = b"Do as you like.\n"
    digest = sha256(content)
    fields = {
        "schema": manifests.SCHEMA,
        "bundle_id": "0" * 32,
        "product": manifests.PRODUCT,
        "kind": "model",
        "name": "tiny",
        "version": "1.0.0",
        "sequence": 1,
        "issued_at": manifests.format_time(NOW - DAY),
        "not_before": manifests.format_time(NOW - DAY),
        "expires": None,
        "min_engine": "0.1",
        "supersedes": None,
        "base": None,
        "targets": (),
        "requires": (),
        "model": _MODEL,
        "resources": {"gpu_memory": 0, "gpus": 0},
        "chunk_size": 4096,
        "files": (_file("LICENSE", content, digest),),
        "total_size": len(content),
        "volumes": (),
        "oms_sha256": None,
        "attestations": (),
        "licences": ({"member": "licence/LICENSE", "size": 1, "sha256": digest, "spdx": "MIT", "accept": False},),
        "canary": (),
        "canary_pass_percent": 100,
        "critical": (),
    }
    return Manifest.model_validate(fields | changes)


def _file(path: str, content: bytes, digest: str) -> File:
    kind, role = manifests.media_type_of(path), manifests.role_of(path)
    return File(path=path, size=len(content), sha256=digest, media_type=kind, role=role, chunks=(digest,))


def head_of(
    publisher: Signer,
    *,
    signers: Sequence[Signer] = (RELEASE_KEY,),
    chain: Sequence[x509.Certificate] = (),
    second: Signer | None = None,
    revocation: bytes | None = None,
    **changes: object,
) -> Head:
    """A bundle's head: a manifest with `changes`, signed by a publisher and release keys."""
    unsigned = manifest_of(**changes)
    resources = [oms.Resource(file.path, file.sha256) for file in unsigned.files]
    raw = oms.sign_model("tiny", resources, publisher, chain=chain, second=second)
    manifest = unsigned.model_copy(update={"oms_sha256": sha256(raw)})
    envelope = dsse.Envelope(manifest.encode(), manifests.PAYLOAD_TYPE)
    for signer in signers:
        envelope = envelope.signed_by(signer)
    return Head(b"{}", (), envelope.encode(), raw, revocation)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: str,
    issuer: x509.Name,
    public: object,
    begins: datetime = NOW - 99 * DAY,
    ends: datetime = NOW + 99 * DAY,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(public)  # type: ignore[arg-type]  # one that certificates can hold
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
    )


def _signed(builder: x509.CertificateBuilder, private: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(private.public_key()), critical=False
    )
    return builder.sign(private, hashes.SHA384())


def _usage(*, key_cert_sign: bool, crl_sign: bool = False, signs: bool = True) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signs and not key_cert_sign,
        content_commitment=False,
        key_encipherment=not signs,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
