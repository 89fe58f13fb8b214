"""The command line, ``adaptive-c demo`` and so on (``python -m adaptive_c`` is the same program)."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__
from .figures import FIGURES, draw


def main(arguments: Sequence[str] | None = None) -> int:
    """The program: read the command line, run what it names, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="adaptive-c", description="Optimizers that update large NumPy arrays in place."
    )
    parser.add_argument("--version", action="version", version=f"adaptive_c {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train two small models with every optimizer, then step one large array")
    demo.add_argument("--quick", action="store_true", help="a shorter training and a smaller array, within 20 seconds")
    drawn = commands.add_parser("figures", help="draw what the rules do, from their own courses: PNG, SVG, GIF and CSV")
    drawn.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(FIGURES)}; all of them unless named")
    bench = commands.add_parser("bench", help="time this library and its peers, each checked against the reference")
    bench.add_argument("groups", nargs="*", metavar="ROWS", help="sizes, rules, float64, whole, formats, lists, "
                       "drop-in, threads, rows, import, memory; all of them unless named")  # fmt: skip
    bench.add_argument(
        "--quick", action="store_true", help="smaller arrays and fewer rounds: under a minute, four with all peers"
    )
    bench.add_argument(
        "--rounds", type=int, metavar="N", help="how often each contender has its turn, 5 or more (21; quick: 7)"
    )
    bench.add_argument("--config", metavar="FILE", help="a TOML file of settings, such as benchmarks/recorded.toml")
    explore = commands.add_parser("explore", help="a local page: courses of the optimizers on surfaces that you choose")
    explore.add_argument(
        "--port", type=_port, default=5006, metavar="P", help="where it listens (5006); 0: any free port"
    )
    explore.add_argument("--no-browser", action="store_true", help="only print the address, open no browser")
    for command in (demo, drawn, bench):
        command.add_argument("--out", default=".", metavar="FOLDER", help="where the files go (default: here)")
    commands.add_parser("config", help="print instruction set, OpenMP runtime and threads, and why")
    options = parser.parse_args(arguments)
    if options.command == "config":
        from ._native import show_config

        show_config()
        return 0
    if options.command == "figures" and (unknown := [name for name in options.names if name not in FIGURES]):
        parser.error(f"there is no figure {unknown[0]!r}; there are {', '.join(FIGURES)}")
    if options.command == "explore":
        return _explore(parser, options)
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)  # before the work, so that it isn't lost
    except OSError as error:
        parser.exit(1, f"adaptive-c {options.command}: can't write to --out {options.out}: {error}\n")
    if options.command == "bench":
        return _bench(parser, options)
    try:
        return _figures(options) if options.command == "figures" else _demo(options)
    except ImportError as error:
        _needs(parser, options.command, error)


def _needs(parser: argparse.ArgumentParser, extra: str, error: ImportError) -> NoReturn:
    """End with the name of the extra that is missing, which is the command's, unless the error is another one."""
    what = (error.name or "").partition(".")[0]
    if what not in ("matplotlib", "PIL", "rich", "sklearn", "bokeh", "tornado"):
        raise error
    parser.exit(1, f"adaptive-c {extra} needs {what}: pip install 'adaptive_c[{extra}]' (from a clone: '.[{extra}]')\n")


def _port(text: str) -> int:
    """A port as argparse reads it; ValueError becomes a message with the usage."""
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError
    return port


def _explore(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Serve the explorer until Ctrl-C."""
    try:
        from .explore.server import serve

        serve(options.port, not options.no_browser)
    except ImportError as error:
        _needs(parser, "explore", error)
    except KeyboardInterrupt:  # before the server is there, which ends by itself
        return 130
    except OSError as error:
        parser.exit(1, f"adaptive-c explore: can't listen on port {options.port}: {os.strerror(error.errno or 0)}; "
                       "choose another with --port, or any free one with --port 0\n")  # fmt: skip
    return 0


def _demo(options: argparse.Namespace) -> int:
    """Train the demo's models and write its picture."""
    from .demo import run

    run(quick=options.quick, folder=options.out)
    return 0


def _figures(options: argparse.Namespace) -> int:
    """Draw the named figures, or all of them, and print the paths of the files."""
    for path in draw(options.names or list(FIGURES), Path(options.out)):
        print(path)
    return 0


def _bench(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Run the suite; write its JSON file, its tables and its pictures."""
    from .bench import report, suite

    try:
        settings = suite.settings(options.config, options.quick, options.groups, options.rounds)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"can't read --config {options.config}: {error}")
    folder = Path(options.out)
    try:
        results = suite.run(settings, folder)
    except KeyboardInterrupt:
        parser.exit(130, f"stopped; {folder / 'adaptive-c-bench.json'} has the rows that were finished\n")
    text = report.markdown(results)
    written = [folder / "adaptive-c-bench.json", folder / "adaptive-c-bench.md"]
    written[1].write_text(text)
    print(text)
    try:
        written += report.pictures(results, folder)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        print("no pictures: pip install matplotlib (or 'adaptive_c[bench]')")
    print("wrote", ", ".join(map(str, written)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
