"""`python -m jdkd`, the same as `jdkd`."""

import sys

from jdkd.cli import main

sys.exit(main())
