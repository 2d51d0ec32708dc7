"""One file a command: its options next to what it does.

Each has NAME, HELP, EXTRA (of our package, with what the command imports), `add_options(parser)`
and `run(arguments)`, which returns an exit code and imports what it needs only then.
"""
