"""The models: committed versions, where each stands, what is deployed of them; how far an import is."""

from admin_tui.cells import Cell, Column, Fact, Line, Row, Symbols, Tone, bar, fit, wrap
from admin_tui.state import Import, State
from admin_tui.units import size
from admin_tui.views.dashboard import state_of
from admin_tui.views.figures import duration, moment, number
from appliance.protos import admin_pb2

COLUMNS = (
    Column("MODEL", 20, grows=3, ends=True),
    Column("SEQ", 4, right=True),
    Column("DIGEST", 12),
    Column("STATE", 9),
    Column("SIZE", 9, right=True),
    Column("DEPLOYED AS", 19, grows=3),
    Column("IMPORTED (UTC)", 16, from_width=100),
    Column("ARCHITECTURE", 20, grows=1, from_width=124),
)
EMPTY = "no model versions yet: I imports a bundle, as does cloister bundle import"
_BAR = 24
_MOST_LINES = 4
_SILENCE_S = 10.0


def rows(state: State) -> tuple[Row, ...]:
    """One row each, the newest first."""
    return tuple(Row(v.model_digest, _cells(state, v)) for v in reversed(state.versions or ()))


def detail(state: State, digest: str) -> tuple[Fact, ...]:
    """Everything about one version."""
    found = next((v for v in state.versions or () if v.model_digest == digest), None)
    if found is None:
        return ()
    facts: list[Fact] = [
        (found.kind or "model", f"{found.name}@{found.version}, sequence {found.sequence}", Tone.STRONG),
        *_wrong(found),
        ("digest", found.model_digest, Tone.PLAIN),
        *((("signed by", signer, Tone.PLAIN)) for signer in found.signers),
        ("size", f"{size(found.total_size)} ({found.total_size:,} bytes)", Tone.PLAIN),
        ("form", found.architecture or "-", Tone.PLAIN),
        ("imported", f"{moment(found.imported_at)} UTC", Tone.PLAIN),
    ]
    deployed = _deployments(state, found)
    for deployment in deployed:
        cell = state_of(deployment)
        facts.append(("deployed", f"{cell.text}, as {deployment.name}", cell.tone))
        facts += [("  alias", name, Tone.PLAIN) for name in _aliases(state, deployment)]
    if not deployed:
        facts.append(("deployed", f"no: cloister model load {found.name}@{found.version} --as NAME", Tone.DIM))
    facts += _said(found)
    return tuple(facts)


def standing(version: admin_pb2.ModelVersion) -> Cell:
    """Where a version stands; what is wrong with it comes first."""
    if version.revoked:
        return Cell("REVOKED", Tone.CRIT)
    if version.damaged:
        return Cell("DAMAGED", Tone.CRIT)
    tones = {"active": Tone.OK, "committed": Tone.WARN, "retired": Tone.DIM}
    return Cell(version.state or "-", tones.get(version.state, Tone.PLAIN))


def _wrong(version: admin_pb2.ModelVersion) -> list[Fact]:
    """What is wrong with a version."""
    facts: list[Fact] = [
        ("damaged", f"{path}: import the same bundle again", Tone.CRIT) for path in version.damaged
    ]
    if version.revoked:
        facts.append(("revoked", f"{version.revoked}: it is not loaded again", Tone.CRIT))
    return facts


def _said(version: admin_pb2.ModelVersion) -> list[Fact]:
    """What custodians said of a version, and its licences."""
    facts: list[Fact] = []
    if version.approvals_required:
        wanted = f"{len(version.approvals)} of {version.approvals_required} custodians"
        facts += [("approved", wanted, Tone.PLAIN), *(("  by", keyid, Tone.PLAIN) for keyid in version.approvals)]
    asks = " (to be accepted before first use)" if version.licence_acceptance else ""
    facts += [("licence", f"{spdx}{asks}", Tone.PLAIN) for spdx in version.licences]
    return facts


def import_lines(importing: Import | None, width: int, symbols: Symbols) -> tuple[Line, ...]:
    """An import in a few lines: what, then how far and at what, or how it ended; none when there was none."""
    if importing is None:
        return ()
    if importing.elsewhere:
        progress = importing.progress or admin_pb2.ImportBundleResponse()
        text = f"IMPORT {progress.state} elsewhere: I with {importing.path} joins it"
        return (((fit(text, width, symbols, ends=True), Tone.STRONG),),)
    progress = importing.progress or admin_pb2.ImportBundleResponse(state="asking")
    head = "IMPORT " + "  ".join(part for part in (progress.model_version, importing.path) if part)
    first: Line = ((fit(head, width, symbols, ends=True), Tone.STRONG),)
    if importing.running:
        return (first, *_moving(importing, progress, width, symbols))
    text, bad = ended(importing)
    level, tone = ("OK ", Tone.OK) if not bad else ("CRIT ", Tone.CRIT)
    if importing.lost and not importing.refused:
        level, tone = "WARN ", Tone.WARN
    return (first, *(((line, tone),) for line in wrap(level + text, width, symbols)[:_MOST_LINES]))


def ended(importing: Import) -> tuple[str, bool]:
    """The end of an import for the message line, and whether it is bad; nothing while it runs."""
    progress = importing.progress
    if importing.refused:
        return f"REFUSED {importing.lost}", True
    if importing.lost:
        return f"{importing.lost}; the import may go on: I with the same path joins it, or begins again", True
    if progress is None or progress.state not in ("committed", "rejected"):
        return "", False
    if progress.state == "rejected":
        return f"REJECTED {progress.reason}: {progress.message}", True
    return _committed(progress), False


def _committed(progress: admin_pb2.ImportBundleResponse) -> str:
    if progress.kind == "trust":
        return "committed: the trust bundle is in force"
    if progress.bytes_done < progress.bytes_total:
        return f"committed {progress.model_version}: in the store already, the payload was not read"
    return f"committed {progress.model_version}, {size(progress.bytes_done)} verified"


def _moving(
    importing: Import, progress: admin_pb2.ImportBundleResponse, width: int, symbols: Symbols
) -> tuple[Line, Line]:
    """Bar, percentage, bytes, rate, time left; below them the state, the file, and whether nothing moves."""
    facts = [progress.state, progress.file]
    if not progress.bytes_total:
        facts.append("signatures, root of trust and policy first")
    silent = importing.silence > _SILENCE_S and not progress.volume_wanted
    if progress.volume_wanted:
        facts = [f"WARN waits for volume {progress.volume_wanted} of {progress.volumes}: I names it"]
        facts += [progress.volume_refused] if progress.volume_refused else []
    if silent:
        facts.insert(1, f"WARN nothing moved for {duration(importing.silence)}: is the medium still there?")
    second = fit("  ".join(fact for fact in facts if fact), width, symbols)
    below: Line = ((second, Tone.WARN if silent or progress.volume_wanted else Tone.PLAIN),)
    if not progress.bytes_total:
        return ((bar(0, _BAR, symbols), Tone.BAR),), below
    done, total = progress.bytes_done, progress.bytes_total
    facts = [f"{100 * done // total:3d}%", f"{size(done)} of {size(total)}"]
    if importing.rate:
        facts += [f"{size(importing.rate)}/s", f"{duration((total - done) / importing.rate)} left"]
    text = fit(" " + "  ".join(facts), max(0, width - _BAR), symbols)
    return ((bar(done / total, _BAR, symbols), Tone.BAR), (text, Tone.PLAIN)), below


def _cells(state: State, version: admin_pb2.ModelVersion) -> tuple[Cell, ...]:
    return (
        Cell(f"{version.name}@{version.version}", Tone.STRONG),
        number(version.sequence),
        Cell(version.model_digest[:12]),
        standing(version),
        Cell(size(version.total_size), order=float(version.total_size)),
        _deployed(state, version),
        Cell(moment(version.imported_at), order=float(version.imported_at.seconds)),
        Cell(version.architecture),
    )


def _deployed(state: State, version: admin_pb2.ModelVersion) -> Cell:
    """Deployments with their states, and the aliases of each where they differ from its name."""
    parts, tone = [], Tone.OK
    for found in _deployments(state, version):
        cell = state_of(found)
        tone = tone if cell.tone is Tone.OK else cell.tone
        aliases = [name for name in _aliases(state, found) if name != found.name]
        parts.append(f"{cell.text} {found.name}" + (f" ({', '.join(aliases)})" if aliases else ""))
    return Cell("; ".join(parts), tone) if parts else Cell("-", Tone.DIM)


def _deployments(state: State, version: admin_pb2.ModelVersion) -> list[admin_pb2.Deployment]:
    found = state.status.deployments if state.status else ()
    return [d for d in found if d.model_digest == version.model_digest]


def _aliases(state: State, deployment: admin_pb2.Deployment) -> list[str]:
    return [a.name for a in state.aliases or () if a.deployment == deployment.name]
