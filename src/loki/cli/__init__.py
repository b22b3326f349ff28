"""The command line: one small file for each command; nothing here but reading options and showing results."""
