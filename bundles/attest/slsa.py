"""SLSA provenance: which tool made the bundle's files what they are, from what, and how it was told to.

The statement is not signed by itself: the manifest names its digest, and the release keys sign the manifest.

Source: SLSA v1.0, provenance; in-toto Attestation Framework, Statement v1 and ResourceDescriptor v1.
"""

from collections.abc import Iterator

from bundles.attest.facts import TOOL, Facts, Made, derived_uuid, encode

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:x-cloister:build:bundle:1"
_MOST_SOURCES = 10_000
BUILDER = "urn:x-cloister:builder:bundle-build"


def provenance(facts: Facts) -> bytes:
    """The provenance of a bundle's files, as the bytes of `attest/slsa.json`."""
    definition = _definition(facts)
    return encode(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": file.path, "digest": {"sha256": file.sha256}} for file in facts.listed],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "buildDefinition": definition,
                "runDetails": {
                    "builder": {"id": BUILDER, "version": {TOOL: facts.tool_version}},
                    "metadata": {
                        "invocationId": f"urn:uuid:{derived_uuid(definition)}",
                        "startedOn": facts.issued_at,
                        "finishedOn": facts.issued_at,
                    },
                    **_byproducts(facts),
                },
            },
        }
    )


def _definition(facts: Facts) -> dict[str, object]:
    return {
        "buildType": BUILD_TYPE,
        "externalParameters": {
            "name": facts.name,
            "version": facts.version,
            "sequence": facts.sequence,
            "kind": facts.kind,
            "licences": [licence.spdx for licence in facts.licences],
            **facts.parameters,
            **({"preparation": facts.made.steps} if facts.made else {}),
        },
        "internalParameters": {"files": len(facts.files), "subjects": len(facts.listed)},
        "resolvedDependencies": _dependencies(facts),
    }


def _byproducts(facts: Facts) -> dict[str, object]:
    """The account of what the files were made from."""
    if facts.made is None:
        return {}
    name, digest = facts.made.statement
    return {"byproducts": [{"name": name, "digest": {"sha256": digest}}]}


def _dependencies(facts: Facts) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    if facts.upstream is not None:
        digest, same = facts.upstream
        found.append(
            {
                "name": "model.sig",
                "digest": {"sha256": digest},
                "annotations": {
                    "what": "the OpenSSF model signature of the source",
                    "coversTheseFiles": same,
                    "verified": False,
                },
            }
        )
    if facts.made is not None:
        found += [
            {"name": name, "digest": {"sha256": digest}} for name, digest in facts.made.sources[:_MOST_SOURCES]
        ]
        found += [{"name": "calibration", "digest": {"sha256": digest}} for digest in _calibrations(facts.made)]
    if facts.base is not None:
        found.append({"name": "base", "digest": {"sha256": facts.base}})
    for required in facts.requires:
        digests = {"digest": {"sha256": required.model_digest}} if required.model_digest else {}
        found.append({"name": required.name, "uri": f"urn:x-cloister:model:{required.name}", **digests})
    return found


def _calibrations(made: Made) -> Iterator[str]:
    """SHA-256 of each text that the model was calibrated with."""
    for step in made.steps:
        match step.get("calibration"):
            case {"sha256": str(digest)}:
                yield digest
