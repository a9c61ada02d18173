#!/usr/bin/env bash
# Write the hash-locked files of requirements/ from pyproject.toml, at the versions of constraints.txt.
#     make lock
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
common=(pip compile pyproject.toml --extra train --extra serve --extra ray --extra evaluate --universal --python-version 3.11
  --generate-hashes --no-header --no-annotate --constraints constraints.txt --quiet)
"$uv" "${common[@]}" --output-file requirements/cuda.lock
# A CPU has a build of torch of its own, from another index and with other hashes: the user installs that one first.
without=()
for name in $(grep -oE '^(torch|triton|nvidia[a-z0-9-]*|cuda[a-z0-9-]*)' requirements/cuda.lock); do without+=(--no-emit-package "$name"); done
"$uv" "${common[@]}" "${without[@]}" --output-file requirements/cpu.lock
