#!python
"""`veloxquant` on PATH: becomes the program inside the package, so that signals and the exit status are its own."""

import importlib.util
import os
import sys

folder = os.path.dirname(importlib.util.find_spec("veloxquant_mlx").origin)  # without importing it
os.execv(os.path.join(folder, "bin", "veloxquant"), sys.argv)
