"""The network's side of the house: TLS in, one request walked through control, engine-text and engine-worker."""
