"""The way of a request through control: authorize, admit, await the intent, settle."""
