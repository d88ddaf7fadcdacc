"""Whether a signed document has the signatures that a role of the trust root demands, and if not, why.

Signatures are counted by key, never by number; revoked keys do not count. A hybrid role needs a classical and a
post-quantum signature among those that count.
"""

from collections.abc import Collection

from bundles.format.errors import BundleError
from bundles.trust.dsse import Envelope
from bundles.trust.roots import Root, check_hybrid


def count(
    envelope: Envelope, root: Root, role: str, what: str, revoked: Collection[str] = frozenset()
) -> tuple[str, ...]:
    """Ids of the role's keys that signed; at least one.

    Args:
        envelope: the signed document.
        root: whose role it is.
        role: its name.
        what: names the document in errors.
        revoked: ids of keys that do not count.

    Raises:
        BundleError: ROLE_ABSENT, SIGNATURE_MISSING, SIGNATURE_UNKNOWN_KEY, SIGNATURE_WRONG_ROLE,
            SIGNATURE_INVALID, SIGNATURE_ENCODING, KEY_REVOKED.
    """
    if role not in root.roles:
        raise BundleError("ROLE_ABSENT", f"{what} must be signed by the role {role}, which the trust root lacks")
    keys = root.role_keys(role)
    valid = envelope.valid_keys(key for key in keys if key.keyid not in revoked)
    if valid:
        return valid
    named = {signature.keyid for signature in envelope.signatures}
    if not named:
        raise BundleError("SIGNATURE_MISSING", f"{what} is not signed")
    if envelope.valid_keys(keys):
        raise BundleError("KEY_REVOKED", f"{what} is signed by revoked keys only")
    if envelope.valid_old_keys(keys):
        raise BundleError("SIGNATURE_ENCODING", f"{what} is signed as before DSSE v1; sign it with a newer tool")
    if named & set(root.roles[role].keyids):
        raise BundleError(
            "SIGNATURE_INVALID", f"the signature of {what} does not verify: it was changed after signing"
        )
    if named & root.keys.keys():
        raise BundleError("SIGNATURE_WRONG_ROLE", f"{what} is signed by keys that may not sign as {role}")
    raise BundleError("SIGNATURE_UNKNOWN_KEY", f"{what} is signed by nobody this trust root knows")


def demand(
    envelope: Envelope, root: Root, role: str, what: str, revoked: Collection[str] = frozenset()
) -> tuple[str, ...]:
    """Like `count`, for a document that is nothing until the role's threshold is met.

    Raises:
        BundleError: as `count`; PQ_SIGNATURE_MISSING, CLASSICAL_SIGNATURE_MISSING, SIGNATURE_DUPLICATE,
            SIGNATURE_DAMAGED, SIGNATURE_THRESHOLD.
    """
    valid = count(envelope, root, role, what, revoked)
    if role in root.extension.hybrid:
        check_hybrid((root.keys[keyid] for keyid in valid), what)
    threshold = root.roles[role].threshold
    if len(valid) < threshold:
        raise _too_few(envelope, root, role, valid, what, revoked)
    return valid


def _too_few(
    envelope: Envelope, root: Root, role: str, valid: Collection[str], what: str, revoked: Collection[str]
) -> BundleError:
    held = root.roles[role]
    must = f"{len(valid)} {role} keys signed {what}, {held.threshold} must"
    named = [signature.keyid for signature in envelope.signatures if signature.keyid in held.keyids]
    if len(envelope.valid_keys(root.role_keys(role))) >= held.threshold:
        return BundleError("KEY_REVOKED", f"{must}; others that signed are revoked")
    if len(set(named)) < len(named):
        return BundleError("SIGNATURE_DUPLICATE", f"{must}; one signed twice, which counts once")
    if set(named) - set(valid) - set(revoked):
        return BundleError("SIGNATURE_DAMAGED", f"{must}; another signature does not verify")
    return BundleError("SIGNATURE_THRESHOLD", must)
