"""Makes every Python process with this folder on its path use the pretended device."""

import os
import sys

# pip and venv need no device, and the starts of many processes take long enough.
if "NEMO_CARE_PRETENDED_CUDA" in os.environ and sys.argv[:1] != ["-m"]:
    sys.path.append(os.path.join(os.path.dirname(__file__), os.pardir))
    import pretended_cuda

    pretended_cuda.install()
