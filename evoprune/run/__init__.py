"""One run, from its settings to its last file."""
