"""`python -m vitfast` is the `vitfast` command."""

import sys

from vitfast.commands.main import main

sys.exit(main())
