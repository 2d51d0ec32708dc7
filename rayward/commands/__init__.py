"""One file a command: its options beside what it does.

Each has NAME, HELP, `add_options(parser)` and `run(arguments)`, which returns an exit code and
imports what it needs only then.
"""
