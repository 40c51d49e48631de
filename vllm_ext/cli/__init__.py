"""The command line: a file a command. It is the one place that may import everything."""
