"""`python -m slimtune`: the command line, also where the script is not on the path."""

from slimtune.cli import main

if __name__ == "__main__":
    main()
