#!/usr/bin/env python3
"""Checks that includes between the folders of veloxquant/ only point up the list of docs/design.md."""
import pathlib
import re
import sys

ORDER = "core kernels quantize plan text model cache generate calibrate allocators evaluate cli".split()
PUBLIC = {"base.h": "text", "veloxquant.h": "evaluate"}  # the stable headers, and the last folder that each may include
NEEDS_MLX = ORDER[ORDER.index("model"):]

root = pathlib.Path(__file__).resolve().parent.parent
errors = []
for path in sorted((root / "veloxquant").rglob("*.*")):
    folder = PUBLIC.get(path.name) if path.parent == root / "veloxquant" else path.relative_to(root / "veloxquant").parts[0]
    if path.suffix not in (".h", ".cpp", ".cuh", ".cu") or folder not in ORDER:
        if path.is_file():
            errors.append(f"{path.relative_to(root)}: folder or kind of file that docs/design.md does not list")
        continue
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if re.match(r'#include [<"]mlx/', line) and folder not in NEEDS_MLX:
            errors.append(f"{path.relative_to(root)}:{number}: {folder}/ must build without MLX")
        if match := re.match(r'#include "(?:veloxquant/)?([a-z_]+)/', line):
            other = match.group(1)
            if other in ORDER and ORDER.index(other) > ORDER.index(folder):
                errors.append(f"{path.relative_to(root)}:{number}: {folder}/ may not include {other}/, which stands below it")
print("\n".join(errors) or "includes: in order")
sys.exit(bool(errors))
