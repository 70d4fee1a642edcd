"""Other libraries' names for what ringreduce does: scripts of theirs change only their import."""
