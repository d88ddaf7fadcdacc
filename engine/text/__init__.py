"""engine-text: tokens from text for one deployment, in a process that may be killed."""
