"""A trust bundle: the few kilobytes of roots and revocations that a site carries in every month."""

from collections.abc import Iterable
from pathlib import Path

from bundles.durable import replacing
from bundles.format.container import ContainerWriter
from bundles.format.members import trust_members
from bundles.trust.roots import Root


def write_trust_bundle(path: Path, chain: Iterable[Root], revocation: bytes | None) -> None:
    """Write roots and revocations as a trust bundle, which an appliance imports like any bundle.

    Raises:
        OSError: it cannot be written.
    """
    documents = sorted({root.version: root.raw for root in chain}.items())
    with replacing(path) as stream:
        writer = ContainerWriter(stream)
        for name, content in trust_members(documents, revocation):
            writer.add(name, content)
        writer.close()
