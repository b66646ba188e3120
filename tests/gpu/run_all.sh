#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that may have no network: see --help.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

usage() {
    cat <<'HELP'
usage: tests/gpu/run_all.sh [--help]

Runs the tests marked `gpu` and benchmarks/gpu.py on this machine's GPU. Needs Python 3.11 or newer
with a torch that is built for CUDA, and transformers. What else is missing comes from a folder of
wheels, which tests/gpu/fetch_wheels.sh fills on a machine with network; nothing is downloaded here.

  PYTHON=python3       the interpreter that has torch
  WHEELS=folder        default: wheels beside this script, else in the checkout; NONE: install
                       nothing and use PYTHON as it is
  OUT=folder           where results go (default: ./gpu_results)
  BENCHMARK=options    of benchmarks/gpu.py (default: all of the 3B model's layers)

The packages go into a virtual environment in $OUT that also sees those of PYTHON. nemo-care itself is
taken from this checkout, without asking for its pinned versions: the torch here may be another one.
TransformerEngine is built against CUDA's headers if its core wheel and the source archive of its
torch part are among the wheels; without it, everything else runs.

Exit status: 0 all that could run has passed; 1 a test or the benchmark failed, or the installation;
2 there is no GPU, no torch or no folder of wheels.
HELP
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
    "") ;;
    *)
        usage >&2
        exit 2
        ;;
esac

python=${PYTHON:-python3}
out=${OUT:-gpu_results}
left_out=()
status=0

fail() {
    echo "run_all.sh: $1" >&2
    exit "$2"
}

"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch: set PYTHON" 2
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
    fail "torch finds no GPU here (nvidia-smi shows what the driver finds): nothing was run" 2
if [[ -z "${WHEELS:-}" ]]; then
    WHEELS=$here/wheels
    [[ -d $WHEELS ]] || WHEELS=$root/wheels
fi
[[ $WHEELS == NONE || -d $WHEELS ]] ||
    fail "$WHEELS is no folder: fill one with tests/gpu/fetch_wheels.sh, or set WHEELS=NONE" 2

mkdir -p "$out" || fail "$out can't be made" 1
out=$(cd "$out" && pwd)

# ---------------------------------------------------------------- packages

install() {
    "$python" -m pip install --quiet --no-index --no-deps --disable-pip-version-check "$@"
}

install_wheels() {
    local wheels=() file
    "$python" -m venv --system-site-packages "$out/venv" || return 1
    # A virtual environment inside another one does not see that one's packages.
    local packages
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return 1
    python=$out/venv/bin/python
    echo "$packages" >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
    for file in "$WHEELS"/*.whl; do
        # TransformerEngine comes last, and whole or not at all.
        [[ $(basename "$file") == transformer_engine* ]] || wheels+=("$file")
    done
    ((${#wheels[@]})) || {
        echo "no wheels in $WHEELS" >&2
        return 1
    }
    install --find-links "$WHEELS" "${wheels[@]}"
}

# Where pip has put the headers of CUDA's parts, joined for the compiler.
nvidia_headers() {
    "$python" - <<'PYTHON'
import nvidia
from pathlib import Path

folders = [folder for root in nvidia.__path__ for folder in sorted(Path(root).glob("*/include"))]
print(":".join(map(str, folders)))
PYTHON
}

nvidia_part() {
    "$python" -c "import nvidia.$1 as part; print(list(part.__path__)[0])" 2>/dev/null
}

install_transformer_engine() {
    local core torch_part headers cudnn
    core=$(compgen -G "$WHEELS/transformer_engine_cu*.whl" | head -n 1)
    torch_part=$(compgen -G "$WHEELS/transformer_engine_torch-*.tar.gz" | head -n 1)
    if [[ -z $core || -z $torch_part ]]; then
        left_out+=("TransformerEngine: its core wheel and the source archive of its torch part are not both in $WHEELS")
        return 0
    fi
    headers=$(nvidia_headers) || headers=
    cudnn=$(nvidia_part cudnn)
    export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE
    # Where ninja is; without it the files are compiled one after the other.
    export PATH=$out/venv/bin:$PATH
    # Part of the build that needs newer headers of NCCL; experts only, which this model has not.
    export NVTE_WITH_NCCL_EP=0
    if ! command -v nvcc >/dev/null && [[ -z ${CUDA_HOME:-} ]]; then
        export NVTE_BUILD_USE_NVIDIA_WHEELS=1
    fi
    export CPATH=$headers${CPATH:+:$CPATH}
    if [[ -n $cudnn ]]; then
        export CUDNN_PATH=$cudnn CUDNN_HOME=$cudnn
        export LIBRARY_PATH=$cudnn/lib${LIBRARY_PATH:+:$LIBRARY_PATH}
        export LD_LIBRARY_PATH=$cudnn/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    fi
    # All three or none: Megatron looks for the first two alone, and can't be imported with them.
    mkdir -p "$out/built"
    MAX_JOBS=${MAX_JOBS:-$(nproc)} "$python" -m pip wheel --quiet --no-index --no-deps \
        --disable-pip-version-check --no-build-isolation --wheel-dir "$out/built" "$torch_part" ||
        return 1
    install "$core" "$WHEELS"/transformer_engine-*.whl "$out"/built/*.whl
}

if [[ $WHEELS != NONE ]]; then
    install_wheels >"$out/install.log" 2>&1 ||
        fail "the packages could not be installed: see $out/install.log" 1
    if ! install_transformer_engine >"$out/transformer_engine.log" 2>&1; then
        left_out+=("TransformerEngine: it could not be built, see $out/transformer_engine.log")
    fi
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if ! "$python" -c 'import torch, transformer_engine.pytorch' >>"$out/transformer_engine.log" 2>&1; then
    left_out+=("tests and measurements of TransformerEngine and of 8 bits: it can't be imported, see $out/transformer_engine.log")
fi

# ---------------------------------------------------------------- tests and benchmark

cd "$root" || fail "$root is gone" 1
"$python" -m nemo_care.cli doctor --json >"$out/doctor.json" 2>"$out/doctor.log" ||
    left_out+=("parts that need a package which is missing: see \"problems\" in $out/doctor.json")
"$python" -m pytest -m gpu tests/gpu -ra -p no:cacheprovider --junitxml="$out/tests.xml" \
    2>&1 | tee "$out/tests.log"
((PIPESTATUS[0])) && status=1
read -r -a options <<<"${BENCHMARK:-}"
"$python" benchmarks/gpu.py "${options[@]}" --out "$out/benchmark.json" 2>"$out/benchmark.log" |
    tee "$out/benchmark.md"
((PIPESTATUS[0])) && status=1

echo
echo "results: $out (tests.log, benchmark.md, benchmark.json, doctor.json)"
for line in "${left_out[@]}"; do
    echo "left out: $line"
done
((${#left_out[@]})) || echo "left out: nothing"
exit "$status"
