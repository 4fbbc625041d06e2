"""The files that runs and evaluations leave: one schema per file, used to write it and to read it."""
