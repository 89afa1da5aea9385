# Shared by quickstart, test and check: the environment in .venv, and steps that say how long they take.
# Sourced, not run. Progress goes to stderr, so that stdout holds results only.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=.venv
PY=$VENV/bin/python
LOGS=.edgeq/logs
CORES=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
TICKER=""
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir -p "$LOGS"

die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-1}"
}

say() { printf '%s\n' "$*" >&2; }

stop_ticker() {
  if [[ -n $TICKER ]]; then
    kill "$TICKER" 2>/dev/null || true
    wait "$TICKER" 2>/dev/null || true
    TICKER=""
  fi
}
trap stop_ticker EXIT

# A sign of life: one line that counts on a terminal, a line a minute in a log.
tick() {
  local began=$SECONDS every=60 never
  [[ -t 2 ]] && every=1
  exec {never}<> <(:)  # waiting on a pipe that stays silent leaves no child behind, as sleep would
  while true; do
    read -r -t "$every" -u "$never" || true
    if [[ -t 2 ]]; then
      printf '\r    %d s' $((SECONDS - began)) >&2
    else
      printf '    still running after %d s\n' $((SECONDS - began)) >&2
    fi
  done
}

# step "what, and how long it takes" LOGNAME COMMAND...: quiet unless it fails.
step() {
  local what=$1 log=$LOGS/$2.log began=$SECONDS code=0
  shift 2
  say "==> $what"
  tick &
  TICKER=$!
  "$@" >"$log" 2>&1 </dev/null || code=$?
  stop_ticker
  [[ -t 2 ]] && printf '\r\033[K' >&2
  if ((code != 0)); then
    tail -n 25 "$log" >&2
    die "this step failed (exit code $code): $what; all of its output is in $log" "$code"
  fi
  say "    done in $((SECONDS - began)) s"
}

usable_python() {
  "$1" -c "import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < $2)" >/dev/null 2>&1
}

# The first Python that can make an environment; one that the pins were tried with is preferred to a newer one.
find_python() {
  local below name
  for below in '(3, 14)' '(4, 0)'; do
    for name in ${EDGEQ_PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
      if command -v "$name" >/dev/null 2>&1 && usable_python "$name" "$below"; then
        printf '%s\n' "$name"
        return 0
      fi
    done
  done
  return 1
}

ensure_venv() {
  local python
  if [[ -x $PY ]] && "$PY" -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
    return
  fi
  python=$(find_python) || die "no Python 3.10 or newer with venv and pip was found; install it (on Debian and Ubuntu:\
 apt install python3 python3-venv) or name one in EDGEQ_PYTHON"
  step "Making $VENV with $("$python" -V) (about 20 s)" venv \
    bash -euc "'$python' -m venv --clear $VENV && $PY -m pip install -c constraints.txt --upgrade pip"
}

has() { "$PY" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

ensure_compiler() {
  has llama_cpp && return
  local name
  for name in ${CXX:-} c++ g++ clang++; do
    command -v "${name%% *}" >/dev/null 2>&1 && return
  done
  die "no C++ compiler was found, and llama-cpp-python is compiled here; install one (on Debian and Ubuntu: apt install g++)"
}

# On Linux the default wheel of torch brings gigabytes of CUDA. Ask pip what it would install before it does.
refuse_cuda_torch() {
  if [[ ${EDGEQ_ALLOW_CUDA_TORCH:-} == 1 ]] || has torch; then
    return
  fi
  local report=$LOGS/torch.json
  step "Asking pip which torch it would install (about 10 s)" torch \
    "$PY" -m pip install --dry-run --quiet --report "$report" -c constraints.txt torch
  "$PY" - "$report" <<'PYTHON' ||
import json, re, sys
names = {item["metadata"]["name"].lower() for item in json.load(open(sys.argv[1]))["install"]}
sys.exit(any(re.match(r"nvidia-|cuda-|triton$", name) for name in names))
PYTHON
    die "pip would install torch with gigabytes of CUDA; the tests need only the CPU wheel of torch: add the index that\
 its site names for CPU wheels with PIP_EXTRA_INDEX_URL, or accept CUDA with EDGEQ_ALLOW_CUDA_TORCH=1"
}

# What an installation depends on, its place among it; the editable package follows the tree without a new installation.
fingerprint() {
  "$PY" -c 'import hashlib, pathlib, sys
parts = [pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join([sys.version.encode(), bytes(pathlib.Path.cwd()), *parts])).hexdigest())'
}

# ensure_extras NAME EXTRAS "how long": installs edgeq with those extras unless nothing has changed since.
ensure_extras() {
  local stamp=$VENV/.edgeq-$1 now
  now=$(fingerprint)
  if [[ -f $stamp && $(<"$stamp") == "$now" ]]; then
    return
  fi
  step "Installing edgeq[$2] into $VENV ($3)" "install-$1" \
    "$PY" -m pip install --progress-bar off -c constraints.txt -e ".[$2]"
  printf '%s\n' "$now" >"$stamp"
}

# Compiling llama-cpp-python takes about eleven minutes of one core.
compile_estimate() {
  if has llama_cpp; then
    echo "about 1 min"
  else
    echo "about $((660 / CORES / 60 + 2)) min on $CORES cores: llama-cpp-python is compiled"
  fi
}
