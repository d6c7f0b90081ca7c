"""Look at training runs.

    python analyze.py data --recipe shapes
    python analyze.py curves output/shapes
    python analyze.py evaluate output/shapes/checkpoint_best.pth

`python analyze.py COMMAND --help` lists the options of a command; the modules of analysis/ are the commands.
"""

from collections.abc import Sequence

from analysis import curves, data, evaluation
from core.launch import run_script
from core.options import ArgumentParser

# Modules with the functions add_options(parser) and run(args, processes), and a docstring that starts with the purpose.
COMMANDS = {"data": data, "curves": curves, "evaluate": evaluation}


def get_parser() -> ArgumentParser:
    """Return the parser."""
    parser = ArgumentParser(prog="analyze.py", usage="python analyze.py COMMAND ...", description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        usage = f"python analyze.py {name} ... [options]"
        purpose = module.__doc__.partition("\n")[0]
        command = commands.add_parser(name, prog="analyze.py", usage=usage, help=purpose, description=module.__doc__)
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; see `core.launch.run_script` for the exit codes."""
    parser = get_parser()
    args = parser.parse_args(argv)
    run_script(parser.prog, args.run, args)


if __name__ == "__main__":
    main()
