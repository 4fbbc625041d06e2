"""What tests share: models, runs, and how to read what comes out."""
