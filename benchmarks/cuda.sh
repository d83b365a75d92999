# Sourced by the scripts for CUDA machines: the project's folder, an interpreter, a folder for logs,
# and the wheels in .wheels/, which go into a folder of their own. No network is needed.
set -uo pipefail
if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT" && OUT=$(realpath "$OUT") || exit 1
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
logs=$(mktemp -d)
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} JAX_PLATFORMS=cuda

if compgen -G '.wheels/*.whl' >/dev/null; then
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --find-links .wheels \
    --no-deps --upgrade --target "$logs/site" .wheels/*.whl || exit 1
  export PYTHONPATH=$PYTHONPATH:$logs/site
fi

leave() { # FILE...: the logs and what was written of these, into $OUT where that is asked for
  [ -n "${OUT:-}" ] || return 0
  for file in "$logs"/*.log "$@"; do
    [ ! -e "$file" ] || cp "$file" "$OUT/"
  done
}

SECONDS=0 # the scripts' limits do not count the installation
