"""The operator's console: state without a screen, screens without a database, and what a terminal can show."""
