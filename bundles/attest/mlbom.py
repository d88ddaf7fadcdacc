"""The machine-learning bill of materials: the model with its card, its licences, and every file with its digest.

Source: OWASP CycloneDX 1.6 (ECMA-424), JSON schema bom-1.6; SPDX licence list (identifiers).
"""

from collections.abc import Iterator

from bundles.attest.facts import TOOL, Facts, derived_uuid, encode
from bundles.format.manifest import File, Licence, Requirement

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
_MODEL_REF = "model"
# The identifiers that models are released under, in the list's own case; schemas know no other case.
_SPDX = {
    identifier.lower(): identifier
    for identifier in (
        *("Apache-2.0", "MIT", "MIT-0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Unlicense", "Zlib", "BSL-1.0"),
        *("CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC-BY-NC-ND-4.0"),
        *("CC-BY-3.0", "CC-BY-SA-3.0", "GPL-2.0-only", "GPL-3.0-only", "GPL-3.0-or-later", "LGPL-3.0-only"),
        *("AGPL-3.0-only", "AGPL-3.0-or-later", "MPL-2.0", "EPL-2.0", "EUPL-1.2", "AFL-3.0", "ECL-2.0"),
        *("OFL-1.1", "WTFPL", "CDLA-Permissive-2.0", "CDLA-Sharing-1.0", "ODbL-1.0", "PDDL-1.0", "MulanPSL-2.0"),
    )
}


def bill_of_materials(facts: Facts) -> bytes:
    """The bill of materials of a bundle, as the bytes of `attest/mlbom.json`."""
    bom: dict[str, object] = {
        "$schema": SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": facts.issued_at,
            "lifecycles": [{"phase": "build"}],
            "tools": {"components": [{"type": "application", "name": TOOL, "version": facts.tool_version}]},
            "component": _model(facts),
        },
        "components": [*map(_file, facts.listed), *_required(facts)],
        "dependencies": _dependencies(facts),
    }
    return encode(bom | {"serialNumber": f"urn:uuid:{derived_uuid(bom)}"})


def _model(facts: Facts) -> dict[str, object]:
    return {
        "type": "machine-learning-model",
        "bom-ref": _MODEL_REF,
        "name": facts.name,
        "version": facts.version,
        "licenses": [_licence(licence) for licence in facts.licences],
        **_pedigree(facts),
        "modelCard": {"modelParameters": _parameters(facts), "properties": _properties(facts)},
    }


def _pedigree(facts: Facts) -> dict[str, object]:
    """The models that this one was made from, as its card states."""
    ancestors = facts.card.fields.get("base_model", ())
    if not ancestors:
        return {}
    return {"pedigree": {"ancestors": [{"type": "machine-learning-model", "name": name} for name in ancestors]}}


def _parameters(facts: Facts) -> dict[str, object]:
    task, datasets = facts.card.first("pipeline_tag"), facts.card.fields.get("datasets", ())
    known: dict[str, object] = {"modelArchitecture": facts.model.architecture}
    if facts.model.capabilities:
        known |= {"inputs": [{"format": "text"}], "outputs": [{"format": "text"}]}
    if task:
        known["task"] = task
    if datasets:
        known["datasets"] = [{"type": "dataset", "name": name} for name in datasets]
    return known


def _properties(facts: Facts) -> list[dict[str, str]]:
    model = facts.model
    values = {
        "kind": facts.kind,
        "sequence": str(facts.sequence),
        "parameters": str(model.parameters),
        "dtype": model.dtype,
        "quantisation": model.quantisation or "none",
        "max-context-tokens": str(model.max_context_tokens),
        "capabilities": " ".join(model.capabilities),
        "tokenizer-sha256": model.tokenizer_sha256 or "",
        "languages": " ".join(facts.card.fields.get("language", ())),
        "files": str(len(facts.files)),
        "files-listed": str(len(facts.listed)),
        "bytes": str(sum(file.size for file in facts.files)),
    }
    values |= dict(_made(facts))
    values |= {name.replace(" ", "-"): value for name, value in facts.details.items()}
    return [{"name": f"{TOOL}:{name}", "value": value} for name, value in values.items() if value]


def _made(facts: Facts) -> Iterator[tuple[str, str]]:
    """What was done to the model on its way into the bundle, value by value."""
    for step in facts.made.steps if facts.made else ():
        for name, value in step.items():
            match value:
                case dict():
                    yield from (
                        (f"prepared-{name}-{key}".replace("_", "-"), str(given)) for key, given in value.items()
                    )
                case list() | None:
                    pass
                case _:
                    yield f"prepared-{name}".replace("_", "-"), str(value)
    if facts.made is not None:
        yield "prepared-statement-sha256", facts.made.statement[1]


def _licence(licence: Licence) -> dict[str, object]:
    """An identifier where the SPDX list has it; a schema accepts no other there."""
    identifier = _SPDX.get(licence.spdx.lower())
    return {"license": {"id": identifier} if identifier else {"name": licence.spdx}}


def _file(file: File) -> dict[str, object]:
    return {
        "type": "file",
        "bom-ref": f"file:{file.path}",
        "name": file.path,
        "mime-type": file.media_type,
        "hashes": [{"alg": "SHA-256", "content": file.sha256}],
        "properties": [
            {"name": f"{TOOL}:role", "value": file.role},
            {"name": f"{TOOL}:bytes", "value": str(file.size)},
        ],
    }


def _ref(required: Requirement) -> str:
    """What a required model is called in the bill; several versions of one are several models."""
    return f"model:{required.name}" + (f"@{required.model_digest}" if required.model_digest else "")


def _required(facts: Facts) -> Iterator[dict[str, object]]:
    for required in dict.fromkeys(facts.requires):
        properties = [{"name": f"{TOOL}:manifest-sha256", "value": required.model_digest}]
        yield {
            "type": "machine-learning-model",
            "bom-ref": _ref(required),
            "name": required.name,
            "scope": "required",
            **({"properties": properties} if required.model_digest else {}),
        }


def _dependencies(facts: Facts) -> list[dict[str, object]]:
    references = [f"file:{file.path}" for file in facts.listed]
    references += map(_ref, dict.fromkeys(facts.requires))
    return [{"ref": _MODEL_REF, "dependsOn": references}]
