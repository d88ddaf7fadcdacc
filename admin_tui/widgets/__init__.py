"""The console's widgets: lines that repaint only where they changed, tables, dialogs."""
