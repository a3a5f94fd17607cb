#!python
"""`veloxquant` on PATH: becomes the program inside the package, so that signals and the exit status are its own."""

import importlib.util
import os
import sys

# The package is not imported, which takes seconds.  An editable installation has two folders, one with the sources and one with this.
folders = importlib.util.find_spec("veloxquant_mlx").submodule_search_locations
programs = [os.path.join(folder, "bin", "veloxquant") for folder in folders]
program = next(filter(os.path.exists, programs), programs[0])
os.execv(program, [program, *sys.argv[1:]])
