"""Runs the range test from the command line."""

import sys

from polus.lr_finder.sweep import main

sys.exit(main())
