"""The command line: fastprimer doctor | verify | bench | report | train | generate | scaling."""

from __future__ import annotations

import argparse
import importlib
import io
import sys

COMMANDS = {
    "doctor": ("what this installation can do, and why not the rest", "fastprimer doctor"),
    "verify": ("every operation on every backend: its error against its budget", "fastprimer verify --op rms_norm"),
    "bench": ("ours against eager torch, torch.compile and the machine's own roof", "fastprimer bench --quick"),
    "report": ("results of bench as one HTML page, as plots, and as README's table", "fastprimer report --out report.html"),
    "train": ("train a model: the calculator", "fastprimer train calculator --seed 1 --out runs/calculator"),
    "generate": ("ask a trained model", 'fastprimer generate --model runs/calculator "two plus three equals"'),
    "scaling": (
        "how large a model and how many tokens for a budget, by published laws or one measured here",
        "fastprimer scaling --flops 1e21",
    ),
}
"""Each command is the module of its name, with add_arguments(parser) and run(args) -> exit status."""


UNHEARD = 128 + 13
"""Exit status after SIGPIPE: what was asked for may be incomplete."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if word in COMMANDS), None)
    name = "fastprimer" if chosen is None else f"fastprimer {chosen}"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a word that the terminal does not know is no reason to fail
    try:
        status = _run(argv, chosen)
        if sys.stdout is not None:  # None: it was closed before
            sys.stdout.flush()  # here, where a full disk is an error that can be told
        return status
    except KeyboardInterrupt as stop:  # Ctrl-C is no error of ours to be traced; a command may say what is left of its work
        print(f"{name}: stopped{f': {stop}' if stop.args else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away, as `| head` does: silence, and the status of a program that the signal ended
        sys.stderr.close()
        return UNHEARD
    except OSError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2


def _run(argv: list[str], chosen: str | None) -> int:
    parser = argparse.ArgumentParser(prog="fastprimer", description="Kernels for modern LLMs, proven and measured.")
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    # Only the chosen command's module is imported: some of them take seconds.
    for name, (what, example) in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"Example: {example}")
        if name == chosen:
            module = importlib.import_module(f"fastprimer.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if args.version:
        from fastprimer import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
