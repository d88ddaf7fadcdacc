"""How fast each op is on this machine, beside what its memory and its arithmetic give at most."""
