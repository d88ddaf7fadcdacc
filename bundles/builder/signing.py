"""Signatures on a bundle: the publisher's over the model, then the release's over the manifest.

Every chunk of all volumes is verified first, and only then does a key sign; what is written anew is the beginning
of the first volume.

Source: docs/bundle-format.md, "Signatures".
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from bundles.base import BundleBase
from bundles.builder import sources
from bundles.builder.rewriting import Identity, check_unchanged, identity, rewrite
from bundles.builder.stating import PREPARATION, UPSTREAM
from bundles.content.files import ModelFiles
from bundles.durable import DISK
from bundles.format import manifest as manifests
from bundles.format.container import BLOCK
from bundles.format.errors import BundleError
from bundles.format.manifest import Document, File, Manifest
from bundles.format.members import MANIFEST, OMS, REVOCATION, root_member
from bundles.format.source import beside
from bundles.pipeline import Progress, Report, Sink, State, no_base, stream_payload
from bundles.reader import BundleReader
from bundles.trust import dsse, oms, revocation
from bundles.trust.policy import Head
from bundles.trust.publishers import verify_model
from bundles.trust.roots import SITE_PUBLISHER, Root, parse
from bundles.trust.signers import Signer


@dataclass(frozen=True)
class Signing:
    """Who signs.

    Attributes:
        root: the trust root whose keys these are; it travels in the bundle.
        release_keys: sign the manifest; more may be added in later rounds until the role's threshold is met.
        publisher_key: signs the model (ECDSA).
        oms: a publisher's existing OMS signature, kept byte for byte, instead of `publisher_key`.
        site: `publisher_key` is the site's own; a publisher's signature that is there becomes provenance.
        chain: the publisher's certificate and those above it; none for a raw key.
        second: an ML-DSA key of the publisher that signs the model, too.
        earlier: roots that travel too, for appliances that know an older one.
        revocation: a signed revocation document that travels.
    """

    root: Root
    release_keys: tuple[Signer, ...] = ()
    publisher_key: Signer | None = None
    oms: bytes | None = None
    site: bool = False
    chain: tuple[x509.Certificate, ...] = ()
    second: Signer | None = None
    earlier: tuple[Root, ...] = ()
    revocation: bytes | None = None


def _silent(_: Progress) -> None:
    """Report nothing."""


def sign(path: Path, signing: Signing, *, bases: Sequence[Path] = (), report: Report = _silent) -> tuple[str, ...]:
    """Sign a bundle, in place; the key ids that have signed its manifest now.

    The publisher signs first: the manifest names that signature, so a new one would void every release signature.

    Args:
        path: the bundle: a file, the first of its volumes with the others beside it, or a folder.
        signing: who signs.
        bases: for a delta, the bundle that it was made against, and that one's base where it is a delta, too.
        report: is told the progress.

    Raises:
        BundleError: ALREADY_SIGNED, SITE_MUST_SIGN, KEY_NOT_IN_ROLE, OMS_MISSING, OMS_FILES_DIFFER,
            SIGNER_FAILED, or the bundle itself is refused.
    """
    check_signing(signing)
    before = identity(_signed_file(path))
    with closing(BundleReader(beside(path))) as reader:
        found = _Found.read(reader, signing)
        payload_at = _verify(reader, found, bases, report)
    signed, manifest, documents = _sign(found, signing)
    if path.is_dir():
        _write_folder(path, before, signed, documents)
    else:
        rewrite(path, before, signed, {d.member: documents[d.member] for d in manifest.documents}, payload_at)
    return tuple(signature.keyid for signature in dsse.parse(signed.envelope, "the manifest").signatures)


@dataclass
class _Found:
    """A bundle as it is before signing."""

    head: Head
    envelope: dsse.Envelope
    manifest: Manifest
    documents: dict[str, bytes]

    @classmethod
    def read(cls, reader: BundleReader, signing: Signing) -> "_Found":
        head = reader.read_head()
        envelope = dsse.parse(head.envelope, "the signed manifest")
        if envelope.signatures and signing.publisher_key is not None:
            raise _already_signed(len(envelope.signatures))
        manifest = manifests.parse(envelope.payload)
        _check_publisher(manifest, signing)
        if signing.publisher_key is None:  # what is there must do; known before hours of reading
            _publisher_signature(manifest, head, signing)
        return cls(head, envelope, manifest, {})


def _verify(reader: BundleReader, found: _Found, bases: Sequence[Path], report: Report) -> int:
    """Read every document and chunk, each verified; where the chunks begin in the first volume, bytes."""
    manifest = found.manifest
    at = Progress(State.STREAMING, bytes_total=manifest.total_size, model_version=manifest.reference)
    with ExitStack() as stack:
        base = None
        if manifest.base is not None:
            if not bases:
                no_base(manifest)
            base = stack.enter_context(BundleBase(bases, manifest.base))
        reader.expect(manifest, base.chunks if base else frozenset())
        for document in manifest.documents:
            found.documents[document.member] = reader.read_document(document)
        payload_at = -(-reader.bytes_read // BLOCK) * BLOCK
        stream_payload(reader, manifest, _Discard(), at, report, base)
        reader.read_end()
    return payload_at


class _Discard(Sink):
    """Verified bytes are not needed again."""

    def begin(self, file: File, told: Callable[[int], None]) -> int:
        """See `pipeline.Sink`."""
        return 0

    def write(self, offset: int, block: memoryview) -> None:
        """See `pipeline.Sink`."""

    def settled(self, file: File, size: int) -> None:
        """See `pipeline.Sink`."""

    def end(self, file: File) -> None:
        """See `pipeline.Sink`."""

    def keep(self, digest: str, content: bytes) -> None:
        """See `pipeline.Sink`."""

    def files(self) -> ModelFiles:
        """See `pipeline.Sink`."""
        raise AssertionError("signing judges no files; building and importing do")


def _sign(found: _Found, signing: Signing) -> tuple[Head, Manifest, dict[str, bytes]]:
    """The head with its new signatures, the manifest in it, and all documents by member."""
    manifest, envelope, documents = found.manifest, found.envelope, dict(found.documents)
    upstream = _upstream(found.head.oms, signing)
    if upstream is not None and UPSTREAM not in documents:
        document, documents[UPSTREAM] = sources.document(UPSTREAM, upstream)
        manifest = _with_attestation(manifest, document)
    oms_raw = _publisher_signature(manifest, found.head, signing)
    manifest = manifest.model_copy(update={"oms_sha256": hashlib.sha256(oms_raw).hexdigest()})
    if manifest != found.manifest:
        if envelope.signatures:
            raise _already_signed(len(envelope.signatures))
        envelope = dsse.Envelope(manifest.encode(), manifests.PAYLOAD_TYPE)
    for signer in signing.release_keys:
        envelope = envelope.signed_by(signer)
    head = replace(
        found.head,
        roots=_roots(found.head, (*signing.earlier, signing.root)),
        revocation=signing.revocation or found.head.revocation,
        envelope=envelope.encode(),
        oms=oms_raw,
    )
    return head, manifest, documents


def _check_publisher(manifest: Manifest, signing: Signing) -> None:
    """Refuse to sign as its publisher what is not the publisher's own any more."""
    prepared = any(document.member == PREPARATION for document in manifest.attestations)
    if prepared and not signing.site and (signing.publisher_key or signing.oms):
        raise BundleError(
            "SITE_MUST_SIGN", "the model was converted or quantised here: the site signs it, --site-publisher KEY"
        )


def _already_signed(signatures: int) -> BundleError:
    return BundleError(
        "ALREADY_SIGNED",
        f"{signatures} release signature(s) hold with the publisher's signature that is there; give a release key "
        "alone, or build the bundle again",
    )


def check_signing(signing: Signing) -> None:
    """Refuse, before a bundle is read or built, signers and a revocation document that the root does not know.

    Raises:
        BundleError: KEY_NOT_IN_ROLE; ROLE_ABSENT, the REVOCATION and SIGNATURE codes.
    """
    if signing.revocation is not None:
        revocation.verify(signing.revocation, signing.root).check_fresh(datetime.now(UTC))
    root = signing.root
    publishers = [SITE_PUBLISHER] if signing.site else [r for r in root.publisher_roles if r != SITE_PUBLISHER]
    held = [(signer, ["release"]) for signer in signing.release_keys]
    if signing.publisher_key is not None and not signing.chain:
        held.append((signing.publisher_key, publishers))
    if signing.second is not None:
        held.append((signing.second, publishers))
    for signer, roles in held:
        known = [keyid for role in roles if role in root.roles for keyid in root.roles[role].keyids]
        if signer.key.keyid not in known:
            raise BundleError(
                "KEY_NOT_IN_ROLE", f"the {roles[0]} key is not one of the trust root's {roles[0]} keys"
            )


def _upstream(raw: bytes | None, signing: Signing) -> bytes | None:
    """The signature in the bundle, where the site signs now and it is another's."""
    if raw is None or not signing.site or signing.publisher_key is None:
        return None
    try:
        role = verify_model(raw, signing.root, datetime.now(UTC)).role
    except BundleError:
        return raw
    return None if role == SITE_PUBLISHER else raw


def _with_attestation(manifest: Manifest, document: Document) -> Manifest:
    return manifest.model_copy(update={"attestations": (*manifest.attestations, document)})


def _publisher_signature(manifest: Manifest, head: Head, signing: Signing) -> bytes:
    resources = [oms.Resource(file.path, file.sha256) for file in manifest.files]
    if signing.publisher_key is not None:
        raw: bytes | None = oms.sign_model(
            manifest.name, resources, signing.publisher_key, chain=signing.chain, second=signing.second
        )
    else:
        raw = signing.oms if signing.oms is not None else head.oms
    if raw is None:
        raise BundleError("OMS_MISSING", "the model has no publisher's signature yet; give a publisher key")
    signed = verify_model(raw, signing.root, datetime.now(UTC))
    oms.check_files(signed.resources, {resource.name: resource.digest for resource in resources})
    return raw


def _roots(head: Head, roots: Sequence[Root]) -> tuple[bytes, ...]:
    """The bundle's chain with `roots` in it, oldest first."""
    chain = {parse(raw).version: raw for raw in head.roots} | {root.version: root.raw for root in roots}
    return tuple(chain[version] for version in sorted(chain))


def _signed_file(path: Path) -> Path:
    """The file that has a bundle's release signatures."""
    return path / MANIFEST if path.is_dir() else path


def _write_folder(path: Path, found: Identity, head: Head, documents: Mapping[str, bytes]) -> None:
    """Members of the head anew, the manifest last.

    Killed in between, what it left is signed again as it is, once a member that no manifest lists is removed.
    """
    made = {root_member(parse(raw).version): raw for raw in head.roots}
    made |= {member: content for member, content in documents.items() if member == UPSTREAM}
    made |= {REVOCATION: head.revocation} if head.revocation is not None else {}
    made |= {OMS: head.oms} if head.oms is not None else {}
    check_unchanged(path / MANIFEST, found)
    for member, content in {**made, MANIFEST: head.envelope}.items():
        (path / member).parent.mkdir(exist_ok=True)
        DISK.write_file(path / member, content, 0o444)
