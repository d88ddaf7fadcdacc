"""engine-prepare: makes a model folder from another source before a bundle is built; one shot, serves nobody."""
