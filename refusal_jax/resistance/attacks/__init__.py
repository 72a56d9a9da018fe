"""The resistance tests, one a file."""
