"""A TransformerEngine that can't be imported stops nothing that does not need it."""

import json
import os
import subprocess
import sys

PROGRAM = """
import json
from nemo_care.checks import machine
from nemo_care.errors import InputError
from nemo_care.models.precision import check_transformer_engine
from nemo_care.recipe.schema import Recipe
import megatron.core.models.gpt.gpt_layer_specs, megatron.core.optimizer

model = Recipe().model
check_transformer_engine(model)
model.backend = "transformer_engine"
try:
    check_transformer_engine(model)
except InputError as error:
    refused = str(error)
finding = machine._transformer_engine()
print(json.dumps([refused, finding.state, finding.detail]))
"""


def test_megatron_is_imported_without_it_and_the_reason_is_kept(tmp_path):
    """As on a machine without NVIDIA's driver; `tests/te` has one without its compiled part."""
    error = "libcuda.so.1: cannot open shared object file"
    folder = tmp_path / "transformer_engine"
    folder.mkdir()
    (folder / "__init__.py").write_text(f"raise OSError({error!r})")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    refused, state, detail = json.loads(done.stdout.splitlines()[-1])
    assert state == "broken"
    assert error in detail
    assert error in refused
    assert refused.startswith("model.backend=transformer_engine: ")
