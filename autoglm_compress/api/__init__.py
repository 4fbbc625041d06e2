"""The functions of the package, for Python programs and for the command line."""
