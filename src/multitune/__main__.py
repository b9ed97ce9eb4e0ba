"""`python -m multitune`: the command line."""

from multitune.cli import main

main()
