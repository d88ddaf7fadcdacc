"""Versions removed: what nothing lists any more is deleted, what others share stays."""

from bundles.format.errors import BundleError
from bundles.importer.records import ModelVersion
from bundles.importer.workplace import Workplace


def remove_version(place: Workplace, reference: str) -> tuple[str, int]:
    """Forget a version by name@version or digest, with what is staged of it; its reference, and the bytes freed.

    Its floor stays: an older release of the name is still refused. A digest of which something is staged and
    nothing committed names that.

    Raises:
        BundleError: MODEL_VERSION_NOT_FOUND, MODEL_REQUIRED, IMPORT_RUNNING.
    """
    version = next((v for v in place.ledger.versions() if reference in (v.reference, v.model_digest)), None)
    if version is None and reference not in place.ledger.stagings():
        raise BundleError("MODEL_VERSION_NOT_FOUND", "no such version was imported; name it as name@version")
    model_digest = version.model_digest if version else reference
    with place.desk.claim(model_digest):
        if version is None:
            return "", place.discard_staging(model_digest)
        with place.desk.publishing:
            _check_unneeded(place, version)
            # The record first: a version without one gets it again at the next start, the reverse would stay.
            place.store.remove_record(version.name, version.sequence)
            freed = place.discard_staging(model_digest)
            return version.reference, freed + place.store.remove(place.ledger.remove(version))


def _check_unneeded(place: Workplace, version: ModelVersion) -> None:
    others = [other for other in place.ledger.versions() if other != version]
    for other in others:
        for need in other.requires:
            served = need["model_digest"] in (None, version.model_digest) and need["name"] == version.name
            left = need["model_digest"] is None and any(model.name == version.name for model in others)
            if served and not left:
                raise BundleError(
                    "MODEL_REQUIRED", f"{other.reference} works with {version.reference}; remove that first"
                )
