"""`python -m telescope`."""

import os
import sys

if sys.path[:1] == [os.getcwd()] and not os.path.samefile(
    sys.path[0], os.path.dirname(os.path.dirname(__file__))
):
    # `python -m` imports from the current folder first: a numpy.py there is none of ours.
    del sys.path[0]

from telescope.cli import main

main()
