"""control.db: tenants, keys, deployments, reservations and the ledger, behind one connection in one thread."""
