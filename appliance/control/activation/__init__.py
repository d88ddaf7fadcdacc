"""Activation: a version is loaded, tried on the ordinary way of a request, and put behind an alias."""
