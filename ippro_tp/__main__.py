"""``python -m ippro_tp``: the command line, where ``ippro-tp`` is not on the path."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
