"""The lines around each page: the appliance's state, the pages, what was said last, the keys."""

from rich.cells import cell_len

from admin_tui.actions import Page, action, offered
from admin_tui.cells import Line, Part, Symbols, Tone, fit, last_cells, literal
from admin_tui.state import State, is_silence
from admin_tui.views.figures import short
from appliance.errors import CloisterError

_MOST_OPERATOR = 24
_ALWAYS = ("help", "quit", "palette")
_DIGITS = {Page.DASHBOARD: "1", Page.TENANTS: "2", Page.MODELS: "3", Page.AUDIT: "5"}


def status_line(state: State, width: int, symbols: Symbols) -> Line:
    """What is connected, how long the chain is, who asks, and when control was heard last."""
    left, right = _connections(state, symbols)
    name: Part = (" CLOISTER", Tone.HEAD)
    used = sum(cell_len(text) for text, _ in (name, *left, *right))
    return (name, *left, (" " * max(1, width - used), Tone.PLAIN), *right)


def tabs_line(state: State, page: Page, standing: Line, home: str, width: int, symbols: Symbols) -> Line:
    """The pages with their digits, the present one in brackets; at the right how the table stands, or the site.

    An import that runs is told beside the page that shows it.
    """
    parts: list[Part] = [(" ", Tone.PLAIN)]
    for name, digit in _DIGITS.items():
        here = name is page
        words = f"{digit} {name.title()}" + (_importing(state) if name is Page.MODELS and not here else "")
        text = f"[{words}]" if here else f" {words} "
        parts.append((text, Tone.HEAD if here else Tone.DIM))
    used = sum(cell_len(text) for text, _ in parts)
    room = max(0, width - used - 1)
    shown = [(literal(text, symbols), tone) for text, tone in standing if text]
    if not shown:
        site = f"site {state.status.site}" if state.status and state.status.site else home
        shown = [(_end_of(literal(site, symbols), max(1, room - 1), symbols), Tone.DIM)]
    gap = room - sum(cell_len(text) for text, _ in shown)
    return (*parts, (" " * max(1, gap), Tone.PLAIN), *shown)


def note_line(state: State, width: int, symbols: Symbols) -> Line:
    """Trouble before what was not answered before notes before nothing."""
    if state.trouble is not None:
        text = f"{_trouble(state.trouble)}, trying again: {state.trouble.message}"
        return ((" " + fit(text, max(0, width - 2), symbols), Tone.CRIT),)
    if state.unanswered:
        return ((" " + fit(f"WARN {state.unanswered}", max(0, width - 2), symbols), Tone.WARN),)
    tone = Tone.CRIT if state.note_is_bad else Tone.OK
    return ((" " + fit(state.note, max(0, width - 2), symbols), tone),)


def keys_line(page: Page, width: int, detailed: bool = False) -> Line:
    """The keys of this page, its own first; where they do not all fit, the way out and the help stay.

    Where a row is shown in full, the way back stands before all.
    """
    hinted = sorted((a for a in offered(page) if a.hint), key=lambda a: not a.pages)
    back: list[Part] = [(action("back").key, Tone.STRONG), (" back  ", Tone.DIM)] if detailed else []
    kept, room = [], width - 1 - sum(len(text) for text, _ in back)
    for entry in sorted(hinted, key=lambda a: a.id not in _ALWAYS):
        room -= len(entry.key) + len(entry.hint) + 3
        if room >= -2:
            kept.append(entry)
    parts: list[Part] = [(" ", Tone.PLAIN), *back]
    for entry in (a for a in hinted if a in kept):
        parts += [(entry.key, Tone.STRONG), (f" {entry.hint}  ", Tone.DIM)]
    return tuple(parts)


def _trouble(error: CloisterError) -> str:
    """Nobody answers, or somebody says no."""
    return "NOT REACHABLE" if is_silence(error) else f"REFUSED {error.code}"


def _end_of(path: str, room: int, symbols: Symbols) -> str:
    """The end of a path says more than its beginning."""
    return path if cell_len(path) <= room else symbols.ellipsis + last_cells(path, room - 1)


def _importing(state: State) -> str:
    """How far the import is that was begun here."""
    if state.importing is None or not state.importing.running:
        return ""
    progress = state.importing.progress
    share = f"{100 * progress.bytes_done // progress.bytes_total}%" if progress and progress.bytes_total else "..."
    return f" {share}"


def _connections(state: State, symbols: Symbols) -> tuple[list[Part], list[Part]]:
    """What is connected and how long the chain is; who asks, and when control was heard."""
    if state.status is None:
        word = (f"  {_trouble(state.trouble)}", Tone.CRIT) if state.trouble else ("  asking ...", Tone.DIM)
        return [word], []
    heard = state.heard.strftime("%H:%M:%SZ") if state.heard else ""
    if state.trouble is not None:
        return [(f"  {_trouble(state.trouble)}", Tone.CRIT)], [(f"last heard {heard} ", Tone.DIM)]
    status = state.status
    parts = [_word("GATEWAY", bool(status.gateway_address))]
    names = {"engine-host": "ENGINE", "importer": "IMPORTER"}
    parts += [
        _word(names.get(peer.name, literal(peer.name, symbols).upper()), peer.connected) for peer in status.peers
    ]
    chain = (
        ("  CHAIN BLOCKED", Tone.CRIT)
        if status.audit_blocked
        else (f"  CHAIN {short(status.audit_size)}", Tone.PLAIN)
    )
    return [*parts, chain], [
        (literal(status.operator, symbols)[:_MOST_OPERATOR], Tone.PLAIN),
        (f"  {heard} ", Tone.DIM),
    ]


def _word(name: str, fine: bool) -> Part:
    return (f"  {name} OK", Tone.OK) if fine else (f"  {name} DOWN", Tone.CRIT)
