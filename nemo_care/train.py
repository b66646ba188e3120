"""Entry of `python -m nemo_care.train`, which scripts and torchrun use."""

import sys

from nemo_care.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
