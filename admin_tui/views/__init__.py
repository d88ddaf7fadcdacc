"""What each screen shows of the state: rows, details and alerts, as data."""
