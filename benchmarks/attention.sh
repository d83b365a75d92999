#!/usr/bin/env bash
# All that attention needs of a CUDA machine in one call, of which each step has a limit and all
# together stay under nine minutes: tests on the GPU, a sanitizer, the benchmark and the search for
# tiles. JAX for CUDA and pytest must be there; wheels in .wheels/ go into a folder of their own.
#
#   WIDTHS="32 64 128"  head widths to find tiles for, 64 by default
#   PYTHON=...          python3 by default
#   OUT=folder          also leaves logs, results and the new tiles.py there
source "$(dirname "${BASH_SOURCE[0]}")/cuda.sh"
summary=()

step() { # NAME SECONDS COMMAND...: keeps what it prints, shows the end of it, goes on after failures
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  echo "== $name ($SECONDS s so far)"
  timeout "$limit" "$@" >"$logs/$name.log" 2>&1 || code=$?
  summary+=("$name: exit code $code after $((SECONDS - start)) s")
  [ "$code" = 0 ] || { failed=1; tail -n 25 "$logs/$name.log"; }
}

failed=0
# Side by side, each taking only the memory that it needs; no conftest.py, which is for all tests.
parallel=$("$PYTHON" -c 'import xdist; print("-n 8")' 2>/dev/null)
# shellcheck disable=SC2086
XLA_PYTHON_CLIENT_PREALLOCATE=false step tests 150 "$PYTHON" -m pytest -p no:cacheprovider \
  --noconftest $parallel -rPfEs -m gpu tests/test_gpu_attention.py tests/test_embedding.py

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  # Every array in an allocation of its own: in JAX's pool a read past the end hits a neighbour.
  XLA_PYTHON_CLIENT_ALLOCATOR=platform step sanitizer 70 "$sanitizer" --tool memcheck \
    --report-api-errors no --error-exitcode 9 \
    "$PYTHON" benchmarks/attention.py --quick --systems pallas triton
else
  summary+=("sanitizer: compute-sanitizer is not installed here")
fi

step benchmark 190 "$PYTHON" benchmarks/attention.py
# shellcheck disable=SC2086
step tune 90 "$PYTHON" benchmarks/attention.py --tune --head-widths ${WIDTHS:-64}

leave benchmarks/results/*-attention-* tinyllama_jax/model/tiles.py
echo
grep -A 2 'documents: attention on' "$logs/tests.log"
tail -n 3 "$logs/tests.log"
[ -f "$logs/sanitizer.log" ] && grep -E 'ERROR SUMMARY|Invalid|Error' "$logs/sanitizer.log" | head -n 8
grep -v '^WARNING\|^I0' "$logs/tune.log"
if grep -q 'Written:' "$logs/benchmark.log"; then
  grep -v '^WARNING\|^I0' "$logs/benchmark.log"
else
  cat benchmarks/results/*-attention-*.md # as far as it came
fi
printf '%s\n' "${summary[@]}"
exit "$failed"
