"""Entry of `python -m nemo_care COMMAND`, the command `nemo-care`."""

from nemo_care.cli import main

if __name__ == "__main__":
    main()
