"""The command line: one file for each command, from options to what is printed."""
