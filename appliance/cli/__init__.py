"""The command line: one module per noun or top-level verb, loaded only when it is called."""
