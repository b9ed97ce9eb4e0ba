"""The command line: every command parses its options, calls the library and prints.

Data goes to stdout; progress, hints and errors to stderr. An expected error (`MultituneError`, or a file that
cannot be read or written) is one line and exit code 1.
"""

from multitune.cli.shared import app, main

__all__ = ["app", "main"]
