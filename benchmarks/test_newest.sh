#!/usr/bin/env bash
# Runs the tests with the newest release of every dependency, in an environment of its own that is removed afterwards.
# Usage: benchmarks/test_newest.sh [--constraint FILE] [PYTEST_ARGUMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."
limits=()
if [[ "${1-}" == --constraint ]]; then
  limits=(--constraint "${2:?expected a file after --constraint}")
  shift 2
fi
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/pip" install -q --upgrade "${limits[@]}" -e ".[test]"
"$environment/bin/python" -m hf_flashinfer_attn doctor || true  # its status says whether there is a GPU
OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -n 2 --dist worksteal "$@"
