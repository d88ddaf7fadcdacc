"""Model families on the op protocol: a strict configuration, shared blocks, and one short file per family."""
