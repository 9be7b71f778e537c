"""The `slimtune` script, and `python -m slimtune`, which also works where the script is not on the path."""

import signal

from slimtune.console.libraries import importing, own_process


def main() -> None:
    """Run the command line. While it is imported, Ctrl-C ends the process without a traceback."""
    is_python = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_python:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    own_process()
    with importing(transformers=False):
        from slimtune.cli import main as command_line

    if is_python:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command_line()


if __name__ == "__main__":
    main()
