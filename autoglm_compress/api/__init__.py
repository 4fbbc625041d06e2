"""What the package does, as functions: the command line calls them, and Python programs do."""
