#!/usr/bin/env bash
# Measures a CUDA machine in stages, in one call that takes less than nine minutes:
#
#   OUT=out bash benchmarks/gpu.sh
#   OUT=out LIMIT=170 STAGES="tests ceilings" bash benchmarks/gpu.sh
#
# Programs write each result as soon as it is measured. After each stage, failed ones included, and
# if the call is stopped, OUT/results.tar.gz holds all results and logs so far. JAX for CUDA and
# torch must be installed; wheels in .wheels/ are installed into a temporary folder. No network is
# needed.
#
#   STAGES="..."    run in this order; by default: smoke training breakdown peers
#     smoke         half a minute; if it fails, no other stage is started
#     training      our step beside the PyTorch step that is likely the fastest
#     breakdown     where the time of our step is spent
#     peers         our step with our own kernels, beside transformers and PyTorch's flash attention
#     variants      our step alone, with each option that may make it faster
#     tests         the tests marked gpu
#     ceilings      the speed that the card reaches on matrix products and on copying memory
#     sanitizer     our attention kernels under compute-sanitizer
#     attention     our attention beside cuDNN, tokamax and PyTorch
#     tune          search for the fastest tiles, and write them into tinyllama_jax/model/tiles.py
#     repeat        do two runs give the same bits?
#     learning      does the 120M learn as it does in PyTorch?
#     decoding      generation beside transformers
#   LIMIT=530       seconds for all stages together
#   MODEL=1b        model of training, breakdown, peers and variants; or 120m or demo
#   WIDTHS="64 128" head widths to find tiles for
#   DATA=folder     prepared dataset for learning, instead of Python's standard library; needs grain
#   CACHES=folder   keeps compiled programs for the next stage and the next call
#   COMMIT=...      the commit of the files, where there is no git
#   PYTHON=python3
#   OUT=folder      where the archive goes, and the trace and compiled step of breakdown
set -uo pipefail

STAGES=${STAGES:-smoke training breakdown peers} LIMIT=${LIMIT:-530} MODEL=${MODEL:-1b}
PYTHON=${PYTHON:-python3}
CACHES=$(realpath -m "${CACHES:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/tinyllama-benchmarks}")
LEAST=25 # seconds; in less, a program hardly starts
code=0 stage= logs=$(mktemp -d)

die() { echo "gpu.sh: $1" >&2 && exit 2; }

archive() { # packs all files written since the start; the archive is replaced in one move
  [ -n "${OUT:-}" ] || return 0
  find "$logs" benchmarks/results benchmarks/rehearsed tinyllama_jax/model/tiles.py -maxdepth 1 \
    -type f ! -name '.*' -newer "$logs/begun" -print0 2>/dev/null |
    tar --create --gzip --null --files-from=- --transform='s,.*/,,' \
      --file "$OUT/.results.$$.tar.gz" 2>/dev/null
  # tar exits with 1 if a log grew while it was read.
  [ $? -le 1 ] && mv "$OUT/.results.$$.tar.gz" "$OUT/results.tar.gz"
}

most() { # SECONDS: as many, or as many as are left
  echo $(($1 < LIMIT - SECONDS ? $1 : LIMIT - SECONDS))
}

run() { # NAME SECONDS COMMAND...: runs the command, for at most SECONDS
  local name=$1 limit start=$SECONDS status=0
  limit=$(most "$2")
  shift 2
  if [ "$limit" -lt "$LEAST" ]; then
    echo "== $name: no time left"
    return 0
  fi
  echo "== $name ($SECONDS s so far)"
  # In the background: else bash would handle a signal only after the command ended.
  timeout --kill-after=5 "$limit" "$@" >"$logs/$name.out" 2>"$logs/$name.log" &
  stage=$!
  wait "$stage" || status=$?
  stage=
  cat "$logs/$name.out"
  echo "== $name: exit code $status after $((SECONDS - start)) s"
  [ "$status" = 0 ] || { code=1 && tail -n 25 "$logs/$name.log"; }
  archive
  return "$status"
}

training() { # NAME SECONDS [OPTION...]: given 10 s less, so that it ends by itself with its table
  run "$1" "$2" "$PYTHON" -m benchmarks.step.training --model "$MODEL" --steps 6 \
    --caches "$CACHES" --seconds $(($(most "$2") - 10)) "${@:3}"
}

stage_smoke() { run smoke 100 "$PYTHON" -m benchmarks.card.smoke || exit 1; }
stage_training() { training training 330 --systems ours peer ours; }
stage_peers() { training peers 400 --systems peers ours; }
stage_variants() { training variants 530 --systems variants; }
stage_breakdown() {
  # The trace goes beside the archive, which would become too large to send with it.
  run breakdown 90 "$PYTHON" -m benchmarks.step.breakdown --model "$MODEL" ${OUT:+--keep "$OUT"}
}
stage_ceilings() { run ceilings 60 "$PYTHON" -m benchmarks.kernels.ceilings --tokens 32768; }
stage_attention() { run attention 190 "$PYTHON" -m benchmarks.kernels.attention; }
stage_decoding() { run decoding 240 "$PYTHON" -m benchmarks.generation; }

stage_tests() {
  local parallel
  # In parallel, so each process takes only the memory that it needs. Without conftest.py, which
  # needs packages of the whole suite.
  parallel=$("$PYTHON" -c 'import xdist; print("-n 8")' 2>/dev/null)
  # shellcheck disable=SC2086
  XLA_PYTHON_CLIENT_PREALLOCATE=false run tests 120 "$PYTHON" -m pytest -p no:cacheprovider \
    --noconftest $parallel -rfEs -m gpu tests/model/test_gpu_attention.py tests/model/test_embedding.py \
    tests/model/test_norm.py tests/model/test_loss.py
}

stage_sanitizer() {
  local sanitizer
  sanitizer=$(command -v compute-sanitizer || ls "$CUDA_HOME/bin/compute-sanitizer" 2>/dev/null)
  if [ -z "$sanitizer" ]; then
    echo "== sanitizer: compute-sanitizer is not installed here"
    return
  fi
  # Each array gets an allocation of its own: in JAX's pool, a read past the end of one array
  # would hit another and go unnoticed.
  XLA_PYTHON_CLIENT_ALLOCATOR=platform run sanitizer 100 "$sanitizer" --tool memcheck \
    --report-api-errors no --error-exitcode 9 \
    "$PYTHON" -m benchmarks.kernels.attention --quick --systems pallas triton
}

stage_tune() {
  # shellcheck disable=SC2086
  run tune 150 "$PYTHON" -m benchmarks.kernels.attention --tune --head-widths ${WIDTHS:-64 128}
}

stage_repeat() {
  run repeat 190 "$PYTHON" -m benchmarks.step.repeat --seconds $(($(most 190) - 10))
}

stage_learning() {
  run learning 530 "$PYTHON" -m benchmarks.step.learning --seconds $(($(most 530) - 10)) \
    ${DATA:+--data "$DATA"}
}

# Check what was asked for before any time is spent.
[[ $LIMIT =~ ^[1-9][0-9]*$ ]] && [ "$LIMIT" -ge "$LEAST" ] ||
  die "LIMIT is $LIMIT: give whole seconds, at least $LEAST."
command -v timeout >/dev/null || die "There is no timeout here, which GNU coreutils bring."
for name in $STAGES; do
  declare -F "stage_$name" >/dev/null ||
    die "There is no stage $name: see the list at the top of benchmarks/gpu.sh."
done
if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT" && OUT=$(realpath "$OUT") || exit 2
fi
[ -z "${DATA:-}" ] || DATA=$(realpath "$DATA") || exit 2
[[ $PYTHON != */* ]] || PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/${PYTHON##*/}
cd "$(dirname "${BASH_SOURCE[0]}")/.." && mkdir -m 700 -p "$CACHES" || exit 2
touch "$logs/begun"

leave() {
  [ -z "$stage" ] || kill "$stage" # timeout passes the signal on to its children
  archive
  rm -rf "$logs/site"
  [ "$code" = 0 ] || echo "All logs: $logs"
}
trap leave EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
trap 'exit 129' HUP

export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda} PYTHONUNBUFFERED=1 XDG_CACHE_HOME=$CACHES
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if compgen -G '.wheels/*.whl' >/dev/null; then
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --find-links .wheels \
    --no-deps --upgrade --target "$logs/site" .wheels/*.whl ||
    die "The wheels in .wheels/ cannot be installed: keep one version of each, for this Python."
  export PYTHONPATH=$PYTHONPATH:$logs/site
fi
# Packages without which no program starts; benchmarks/card/smoke.py looks for the others.
missing=$("$PYTHON" -c 'import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' \
  jax flax optax numpy rich tyro docstring_parser typeguard) || die "$PYTHON does not run."
[ -z "$missing" ] || die "There is no ${missing// /, } here. Where there is a network,
\`make wheels\` brings what such machines lack into .wheels/, which is looked for in the project's
folder, and \`pip download --no-deps -d .wheels NAME\` brings more."

# The project's own kernels need CUDA's libdevice and assembler, which XLA looks for in
# /usr/local/cuda and in NVIDIA's wheels only. They may also lie beside nvcc, and Triton has them.
CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
has_both() { [ -e "$1/nvvm/libdevice/libdevice.10.bc" ] && [ -x "$1/bin/ptxas" ]; }
find_cuda() {
  local nvcc triton
  nvcc=$(realpath "$(command -v nvcc)" 2>/dev/null)
  for folder in "$CUDA_HOME" "${nvcc%/bin/nvcc}"; do
    ! has_both "$folder" || { echo "$folder" && return; }
  done
  triton=$("$PYTHON" -c 'import importlib.util
print(importlib.util.find_spec("triton").submodule_search_locations[0])' 2>/dev/null) || return
  mkdir -p "$logs/cuda/nvvm/libdevice" "$logs/cuda/bin"
  ln -s "$triton/backends/nvidia/lib/libdevice.10.bc" "$logs/cuda/nvvm/libdevice/"
  ln -s "$triton/backends/nvidia/bin/ptxas" "$logs/cuda/bin/"
  ! has_both "$logs/cuda" || echo "$logs/cuda"
}
cuda=$(find_cuda)
if [ -n "$cuda" ] && [ "$cuda" != /usr/local/cuda ] && [[ ${XLA_FLAGS:-} != *xla_gpu_cuda_data_dir* ]]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_cuda_data_dir=$cuda"
fi

SECONDS=0 # the limit does not count the installation
for name in $STAGES; do
  "stage_$name"
done
exit "$code"
