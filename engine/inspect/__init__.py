"""engine-inspect: judges a model's files before they are committed, in one short-lived process without torch."""
