"""engine-worker: token steps of one deployment, for the gateways that hold a Session to it."""
