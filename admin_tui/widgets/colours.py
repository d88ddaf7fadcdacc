"""What each tone looks like: the terminal's own sixteen colours, or the console's where there are more."""

from rich.style import Style

from admin_tui.cells import Tone

ANSI: dict[Tone, Style] = {
    Tone.PLAIN: Style(),
    Tone.DIM: Style(dim=True),
    Tone.STRONG: Style(bold=True),
    Tone.OK: Style(color="green"),
    Tone.WARN: Style(color="yellow", bold=True),
    Tone.CRIT: Style(color="red", bold=True),
    Tone.HEAD: Style(bold=True, underline=True),
    Tone.BAR: Style(color="green"),
}
INK, PAPER, MUTED, LINE = "#d7dce5", "#12161f", "#8690a3", "#2a3242"
TRUECOLOUR: dict[Tone, Style] = {
    Tone.PLAIN: Style(color=INK),
    Tone.DIM: Style(color=MUTED),
    Tone.STRONG: Style(color="#ffffff", bold=True),
    Tone.OK: Style(color="#7fd1a3"),
    Tone.WARN: Style(color="#f2c46d", bold=True),
    Tone.CRIT: Style(color="#ff7b72", bold=True),
    Tone.HEAD: Style(color="#7fb2e5", bold=True, underline=True),
    Tone.BAR: Style(color="#7fb2e5"),
}
SELECTED_ANSI = Style(reverse=True)
SELECTED_TRUECOLOUR = Style(bgcolor=LINE)
