#!/usr/bin/env bash
# The training step on a CUDA machine in one call of under nine minutes: what the card reaches at
# most, ours beside PyTorch's, then, in what time is left, where that of ours goes (ceilings.py,
# training.py and breakdown.py of this folder). JAX for CUDA and torch must be there; wheels in
# .wheels/ go into a folder of their own. No network is needed.
#
#   MODEL=1b      120m or demo too
#   VARIANTS=1    ours alone, by all that may make it faster: another call of under nine minutes
#   PYTHON=...    python3 by default
#   OUT=folder    also leaves logs and results there
source "$(dirname "${BASH_SOURCE[0]}")/cuda.sh"

run() { timeout "$1" "$PYTHON" "benchmarks/$2.py" "${@:3}" 2>"$logs/$2.log" || code=1; }

code=0 MODEL=${MODEL:-1b}
# A system that is begun in time may take 90 seconds more.
if [ -n "${VARIANTS:-}" ]; then
  run 525 training --model "$MODEL" --steps 6 --seconds 430 --variants
else
  run 60 ceilings --out "$logs/ceilings.md"
  run 400 training --model "$MODEL" --steps 6 --seconds 305
  run $((530 - SECONDS)) breakdown --model "$MODEL"
fi
[ "$code" = 0 ] || tail -n 25 "$logs"/*.log
leave "$logs"/ceilings.md benchmarks/results/*-{breakdown,training,variants}-*
exit "$code"
