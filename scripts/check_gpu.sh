#!/usr/bin/env bash
# Whether this checkout works on this machine's GPU: builds it in place, runs tests/cuda, times it
# beside its goals, and has compute-sanitizer look at every kernel. Under nine minutes, no network.
#
#   scripts/check_gpu.sh [WHEELS]
#
# Needs nvcc and a Python with torch, NumPy, nanobind, setuptools and pytest; what is missing is
# installed from the folder WHEELS, into a folder of its own. $PYTHON: instead of python3.
# RINGREDUCE_CUDA_ARCHS: which GPUs to compile for; this machine's unless set. Exits with 1 if a
# step failed; one that could not be run is named, and is no failure.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

readonly LONGEST_S=530
readonly PYTHON=${PYTHON:-python3}
site=$(mktemp -d) || exit 1
readonly site
trap 'rm -rf "$site"' EXIT

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export LD_LIBRARY_PATH="$site/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PATH="$site/bin:$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PYTHONUNBUFFERED=1
export RINGREDUCE_CUDA_ARCHS=${RINGREDUCE_CUDA_ARCHS:-native}
export RINGREDUCE_TIMEOUT=${RINGREDUCE_TIMEOUT:-60} # a hang is named before its step is ended
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe

summary=()
failed=0

skip() { # NAME REASON
  echo "=== $1: not run: $2"
  summary+=("not run  $1: $2")
}

step() { # NAME LIMIT_S COMMAND...
  local name=$1 limit_s=$2 left_s=$((LONGEST_S - SECONDS)) started_s=$SECONDS status=0
  shift 2
  if ((left_s < 5)); then
    failed=1
    summary+=("FAILED   $name: no time left")
    return 1
  fi
  if ((limit_s > left_s)); then limit_s=$left_s; fi
  echo "=== $name: $*"
  timeout --kill-after=5 "$limit_s" "$@" || status=$?
  local took="$((SECONDS - started_s)) s"
  if ((status == 0)); then
    summary+=("ok       $name: $took")
    return 0
  fi
  failed=1
  # 124 and 137: ended by timeout.
  if ((status == 124 || status == 137)); then took="ended after $limit_s s"; fi
  summary+=("FAILED   $name: status $status, $took")
  return 1
}

finish() {
  echo "=== summary, after $SECONDS s"
  printf '%s\n' "${summary[@]}"
  exit "$failed"
}

has() { "$PYTHON" -c "import $1" 2>"$site/why" || { tail -n 1 "$site/why"; return 1; }; }

if [[ -n ${1:-} ]]; then
  # Not --target: it drops the lib folder, which is most of an MPI.
  step wheels 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile \
    --ignore-installed --prefix "$site" "$1"/*.whl || finish
  packages=$(find "$site" -type d -name '*-packages' -printf '%p:')
  export PYTHONPATH="$PWD:$packages$PYTHONPATH"
fi
step build 240 "$PYTHON" setup.py --quiet build_ext --inplace || finish
step info 60 "$PYTHON" -m ringreduce.info
step device 60 "$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' ||
  finish

if reason=$(has pytest); then
  # pytest-timeout may be missing: its settings are then unknown ones.
  step tests 180 "$PYTHON" -m pytest -q -p no:cacheprovider tests/cuda
else
  skip tests "$reason"
fi

step goals 120 "$PYTHON" scripts/bench_gpu.py

if reason=$(has mpi4py.MPI) && command -v mpirun >"$site/why"; then
  step "processes sharing the GPU" 60 mpirun -np 4 "$PYTHON" -m ringreduce.bench --device cuda \
    --sizes 4,8K,1M --check 3 --blocks 3 --seconds 15
else
  skip "processes sharing the GPU" "${reason:-no mpirun}"
fi

if sanitizer=$(command -v compute-sanitizer); then
  for tool in memcheck racecheck synccheck; do
    step "$tool" 90 "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 1 \
      "$PYTHON" tests/cuda/exercise.py
  done
else
  skip compute-sanitizer "not on PATH"
fi
finish
