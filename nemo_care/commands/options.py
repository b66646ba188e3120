"""How commands parse their own options and leave the remaining arguments to the recipe."""

import argparse


def option_parser(name: str, usage: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Return a parser for `parse_known_args`; `usage` is what follows the command's name."""
    return argparse.ArgumentParser(
        prog=f"nemo-care {name}",
        usage=f"%(prog)s {usage}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
