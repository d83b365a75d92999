#!/usr/bin/env bash
# On a CUDA machine, in one call of under nine minutes: do two runs give the same bits, and does the
# 120M learn as PyTorch's does (benchmarks/repeat.py, benchmarks/learning.py)? JAX for CUDA and torch
# must be there; wheels in .wheels/ go into a folder of their own. No network is needed.
#
#   DATA=folder     rows of a prepared dataset, instead of Python's standard library; needs grain
#   PYTHON=...      python3 by default
#   OUT=folder      also leaves logs and results there
source "$(dirname "${BASH_SOURCE[0]}")/cuda.sh"

code=0
"$PYTHON" benchmarks/repeat.py --seconds 190 2>"$logs/repeat.log" || code=1
"$PYTHON" benchmarks/learning.py --seconds $((520 - SECONDS)) ${DATA:+--data "$DATA"} \
  2>"$logs/learning.log" || code=1
[ "$code" = 0 ] || tail -n 25 "$logs"/*.log
leave benchmarks/results/*-{learning,repeat}-*
exit "$code"
