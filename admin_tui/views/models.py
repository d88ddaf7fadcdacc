"""The models: committed versions, what is deployed of them, which aliases point there; how far an import is."""

from admin_tui.cells import Cell, Column, Fact, Line, Row, Symbols, Tone, bar, fit
from admin_tui.state import Import, State
from admin_tui.views.dashboard import state_of
from admin_tui.views.figures import duration, moment, number, size
from appliance.protos import admin_pb2

COLUMNS = (
    Column("MODEL", 20, grows=3),
    Column("SEQ", 4, right=True),
    Column("DIGEST", 12),
    Column("SIGNERS", 7, right=True),
    Column("SIZE", 9, right=True),
    Column("DEPLOYED AS", 21, grows=3),
    Column("IMPORTED (UTC)", 16, from_width=100),
    Column("ARCHITECTURE", 20, grows=1, from_width=124),
)
EMPTY = "no model versions yet: I imports a bundle, as cloister bundle import BUNDLE does"
_BAR = 24


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
    return tuple(facts)


def import_lines(importing: Import | None, width: int, symbols: Symbols) -> tuple[Line, ...]:
    """An import in two lines: what, then how far or how it ended; none when there was none."""
    if importing is None:
        return ()
    progress = importing.progress or admin_pb2.ImportBundleResponse(state="asking")
    head = f"IMPORT {importing.path}"
    version = f"  {progress.model_version}" if progress.model_version else ""
    first: Line = ((fit(head + version, width, symbols), Tone.STRONG),)
    if importing.lost:
        text = f"WARN {importing.lost}"
        return (first, ((fit(text, width, symbols), Tone.WARN),))
    if progress.state == "rejected":
        text = f"CRIT REJECTED {progress.reason}: {progress.message}"
        return (first, ((fit(text, width, symbols), Tone.CRIT),))
    if progress.state == "committed":
        return (first, ((fit(_committed(progress), width, symbols), Tone.OK),))
    return (first, _moving(importing, progress, width, symbols))


def ended(importing: Import) -> tuple[str, bool]:
    """The end of an import for the message line, and whether it is bad; nothing while it runs."""
    progress = importing.progress
    if importing.lost:
        return f"{importing.lost}; if the import began, the importer goes on: I with the same path joins it", True
    if progress is None or progress.state not in ("committed", "rejected"):
        return "", False
    if progress.state == "rejected":
        return f"REJECTED {progress.reason}: {progress.message}", True
    return _committed(progress), False


def _committed(progress: admin_pb2.ImportBundleResponse) -> str:
    if progress.bytes_done < progress.bytes_total:
        return f"OK committed {progress.model_version}: in the store already, the payload was not read"
    return f"OK committed {progress.model_version}, {size(progress.bytes_done)} verified"


def _moving(importing: Import, progress: admin_pb2.ImportBundleResponse, width: int, symbols: Symbols) -> Line:
    """Bar, percentage, bytes, rate, time left, state and file; what comes last is cut first."""
    if not progress.bytes_total:
        return (
            (fit(f"{progress.state}: signatures, root of trust and policy first", width, symbols), Tone.PLAIN),
        )
    done, total = progress.bytes_done, progress.bytes_total
    facts = [f"{100 * done // total:3d}%", f"{size(done)} of {size(total)}"]
    if importing.rate:
        facts += [f"{size(importing.rate)}/s", f"{duration((total - done) / importing.rate)} left"]
    facts += [progress.state, progress.file]
    text = " " + "  ".join(fact for fact in facts if fact)
    return ((bar(done / total, _BAR, symbols), Tone.BAR), (fit(text, max(0, width - _BAR), symbols), Tone.PLAIN))


def _cells(state: State, version: admin_pb2.ModelVersion) -> tuple[Cell, ...]:
    return (
        Cell(f"{version.name}@{version.version}", Tone.STRONG),
        number(version.sequence),
        Cell(version.model_digest[:12]),
        number(len(version.signers)),
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
