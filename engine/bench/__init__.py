"""How fast the engine is on this machine: whole steps of the real loop, beside what the memory gives at most."""
