"""The inference engine: it plans, executes and commits token steps, and knows no tenant by name."""
