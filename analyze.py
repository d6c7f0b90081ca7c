"""Look at training data, training runs and trained weights of the three tasks.

    python analyze.py data --recipe shapes
    python analyze.py curves output/shapes
    python analyze.py evaluate output/shapes/checkpoint_best.pth

`python analyze.py COMMAND --help` describes a command. Each is a module of analysis/, with the functions
`add_options(parser)` and `run(args, processes)`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from core.distributed import Processes
from core.launch import run_script
from core.options import ArgumentParser
from utils import UserError

COMMANDS = ("data", "curves", "evaluate")


def get_parser(command: str) -> ArgumentParser:
    """Return the parser of a command; only its own module is imported, for a fast start."""
    module = importlib.import_module(f"analysis.{command}")
    usage = f"python analyze.py {command} ... [options]"
    parser = ArgumentParser(prog="analyze.py", usage=usage, description=module.__doc__)
    module.add_options(parser)
    parser.set_defaults(run=module.run)
    return parser


def run_alone(args: argparse.Namespace, processes: Processes) -> None:
    """Run a command, in one process."""
    if processes.world_size > 1:
        raise UserError("analyze.py runs in one process; start it without a launcher")
    args.run(args, processes)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; see `core.launch.run_script` for the exit codes."""
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(prog="analyze.py", usage="python analyze.py COMMAND ... [options]", description=__doc__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    command = parser.parse_args(argv[:1]).command
    run_script("analyze.py", run_alone, get_parser(command).parse_args(argv[1:]))


if __name__ == "__main__":
    main()
