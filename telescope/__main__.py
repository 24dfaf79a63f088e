"""`python -m telescope`."""

from telescope.cli import main

main()
