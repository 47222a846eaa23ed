"""`python -m drt`: the `drt` command."""

from drt.cli.app import main

if __name__ == "__main__":
    main()
