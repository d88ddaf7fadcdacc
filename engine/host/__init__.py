"""engine-host: what devices there are, and the processes of every deployment on them."""
