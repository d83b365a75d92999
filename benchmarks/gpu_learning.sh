#!/usr/bin/env bash
# On a CUDA machine, in one call of under nine minutes: do two runs give the same bits, and does the
# 120M learn as PyTorch's does (benchmarks/repeat.py, benchmarks/learning.py)? JAX for CUDA and torch
# must be there; wheels in .wheels/ go into a folder of their own. No network is needed.
#
#   DATA=folder     rows of a prepared dataset, instead of Python's standard library; needs grain
#   PYTHON=...      python3 by default
#   OUT=folder      also leaves logs and results there
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
"$PYTHON" benchmarks/repeat.py --seconds 190 2>"$logs/repeat.log" || code=1
"$PYTHON" benchmarks/learning.py --seconds $((520 - SECONDS)) ${DATA:+--data "$DATA"} \
  2>"$logs/learning.log" || code=1
[ "$code" = 0 ] || tail -n 25 "$logs"/*.log
if [ -n "${OUT:-}" ]; then
  cp "$logs"/*.log benchmarks/results/*-learning-* benchmarks/results/*-repeat-* "$OUT"
fi
exit "$code"
