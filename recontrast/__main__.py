"""Run the command line with ``python -m recontrast``."""

from recontrast.app.cli import main

if __name__ == "__main__":
    main()
