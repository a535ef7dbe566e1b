"""The commands: one module each, named for its command, with its arguments and its function."""
