#!/usr/bin/env bash
# Fill a folder with what tests/gpu/run_all.sh installs; on a machine with network: see --help.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: tests/gpu/fetch_wheels.sh [--transformer-engine] FOLDER

Downloads the packages that nemo-care's tests on a GPU import, for Python 3.12 on x86-64 Linux, without
torch, transformers and what these two bring. NeMo is not among them: the tests make their trainers
without it. About 80 MB; --transformer-engine adds TransformerEngine for CUDA 13, 300 MB.

  PYTHON=python3   an interpreter with pip, which also builds the packages that have no wheel
  TARGET=3.12      the Python to fetch for
HELP
}

engine=
[[ ${1:-} == --transformer-engine ]] && {
    engine=1
    shift
}
case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
    "" | -*)
        usage >&2
        exit 2
        ;;
esac
folder=$1
python=${PYTHON:-python3}
target=${TARGET:-3.12}
mkdir -p "$folder"

# pip matches a platform exactly.
platforms=()
for tag in manylinux_2_{39,38,37,36,35,34,33,32,31,30,29,28,27,26,25,24,23,22,21,20,19,18,17} \
    manylinux2014 manylinux2010 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
fetch() {
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
        --only-binary=:all: --python-version "$target" --implementation cp "${platforms[@]}" \
        --dest "$folder" "$@"
}

# With the versions that nemo-care is developed with where they matter.
fetch megatron-core==0.16.1 decord==0.6.0 hydra-core==1.3.2 'omegaconf>=2.3,<2.4' 'av>=18' \
    pillow psutil einops rapidfuzz click nltk joblib absl-py six \
    'rich>=13' markdown-it-py mdurl pygments pandas python-dateutil \
    pytest pluggy iniconfig
# Those have no wheels, and are Python alone.
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" \
    antlr4-python3-runtime==4.9.3 rouge-score==0.1.2

if [[ -n $engine ]]; then
    # Megatron Core 0.16.1 and this project were read against 2.9 to 2.20.
    version=2.18.0
    fetch "transformer-engine==$version" "transformer-engine-cu13==$version" \
        nvidia-cudnn-frontend nvdlfw-inspect onnx onnxscript onnx-ir ml-dtypes protobuf \
        pydantic pydantic-core annotated-types typing-inspection typing-extensions pybind11
    # What builds its torch part: a virtual environment has neither, and torch brings setuptools alone.
    # crt: headers that nvcc's own need, where there is no CUDA_HOME.
    fetch wheel ninja 'nvidia-cuda-crt>=13,<14'
    # Its torch part is built where the GPU is. pip would ask for CUDA to read the archive's name.
    "$python" - "$folder" "transformer_engine_torch-$version.tar.gz" <<'PYTHON'
import hashlib
import json
import sys
import urllib.request
from pathlib import Path

folder, name = sys.argv[1:]
request = urllib.request.Request(
    "https://pypi.org/simple/transformer-engine-torch/",
    headers={"Accept": "application/vnd.pypi.simple.v1+json"},
)
files = json.load(urllib.request.urlopen(request))["files"]
(file,) = [file for file in files if file["filename"] == name]
content = urllib.request.urlopen(file["url"]).read()
if hashlib.sha256(content).hexdigest() != file["hashes"]["sha256"]:
    sys.exit(f"{name}: not what the index says; fetch it again")
Path(folder, name).write_bytes(content)
PYTHON
fi
echo "$folder: $(find "$folder" -type f | wc -l) files, $(du -sh "$folder" | cut -f1)"
