"""The revisions of control.db, oldest first."""
