"""What a run and an evaluation leave on disk: one schema for each file, which it is written and read through."""
