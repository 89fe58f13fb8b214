"""The command line: ``adaptive-c demo`` and ``adaptive-c config`` (``python -m adaptive_c`` is the same program)."""

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="adaptive-c", description="Optimizers that update large NumPy arrays in place."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train two small models with every optimizer, then step one large array")
    demo.add_argument("--quick", action="store_true", help="a shorter training and a smaller array, within 20 seconds")
    demo.add_argument("--out", default=".", metavar="FOLDER", help="where the picture goes (default: here)")
    commands.add_parser("config", help="print instruction set, OpenMP runtime and threads, and why")
    options = parser.parse_args(arguments)
    if options.command == "config":
        from ._config import show_config

        show_config()
        return 0
    try:
        from .demo import run
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("matplotlib", "rich", "sklearn"):
            raise
        parser.exit(
            1, f"adaptive-c demo needs {error.name}: pip install 'adaptive_c[demo]' (from a clone: '.[demo]')\n"
        )
    try:
        run(quick=options.quick, folder=options.out)
    except OSError as error:
        parser.exit(1, f"adaptive-c demo: can't write to --out {options.out}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
