"""Makes every Python process with this folder on its path use the pretended device."""

import os
import sys

# A process without visible devices has no CUDA, as ever.
if "NEMO_CARE_PRETENDED_CUDA" in os.environ and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
    sys.path.append(os.path.join(os.path.dirname(__file__), os.pardir))
    import pretended_cuda

    pretended_cuda.install()
