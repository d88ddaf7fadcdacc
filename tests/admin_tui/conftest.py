"""Textual reads its settings when it is imported: for all tests of one run they are the terminal's own colours."""

from admin_tui import launch

launch.prepare(ansi=True)
