#!/usr/bin/env bash
# The training step on a CUDA machine in one call of under nine minutes: what the card reaches at
# most, where the time of ours goes, then ours beside PyTorch's (ceilings.py, breakdown.py and
# training.py of this folder). JAX for CUDA and torch must be there; wheels in .wheels/ go into a
# folder of their own. No network is needed.
#
#   MODEL=1b      120m or demo too
#   PYTHON=...    python3 by default
#   OUT=folder    also leaves logs and results there
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
logs=$(mktemp -d)
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} JAX_PLATFORMS=cuda

if compgen -G '.wheels/*.whl' >/dev/null; then
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --find-links .wheels \
    --no-deps --upgrade --target "$logs/site" .wheels/*.whl || exit 1
  export PYTHONPATH=$PYTHONPATH:$logs/site
fi

code=0
timeout 60 "$PYTHON" benchmarks/ceilings.py --out "$logs/ceilings.md" 2>"$logs/ceilings.log" || code=1
timeout 150 "$PYTHON" benchmarks/breakdown.py --model "${MODEL:-1b}" --attention pallas \
  2>"$logs/breakdown.log" || code=1
# A system that is begun in time may take 90 seconds more.
timeout 325 "$PYTHON" benchmarks/training.py --model "${MODEL:-1b}" --seconds 230 \
  2>"$logs/training.log" || code=1
[ "$code" = 0 ] || tail -n 25 "$logs"/*.log
if [ -n "${OUT:-}" ]; then
  cp "$logs"/*.md "$logs"/*.log benchmarks/results/*-{breakdown,training}-* "$OUT"
fi
exit "$code"
