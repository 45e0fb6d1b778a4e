#!/usr/bin/env bash
# Everything that a GPU has to show, in at most ten minutes: benchmarks/gpu.sh [FOLDER [flags of benchmarks.speed.kit]]
# FOLDER/results.json and FOLDER/performance.md, for docs/performance.md, grow as it runs; stopping it loses nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m benchmarks.speed.kit --output "${1:-outputs/gpu}" "${@:2}"
