"""`python -m corral.daemon` is corrald."""

import sys

from corral.daemon.main import main

sys.exit(main())
