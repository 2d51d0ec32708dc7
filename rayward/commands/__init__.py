"""One file a command: its options next to what it does.

Each has NAME, HELP, `add_options(parser)` and `run(arguments)`, which returns an exit code and
imports what it needs only then.
"""
