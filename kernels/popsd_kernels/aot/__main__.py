"""``python -m popsd_kernels.aot``."""

import sys

from popsd_kernels.aot.command import main

sys.exit(main())
