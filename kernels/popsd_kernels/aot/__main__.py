"""``python -m popsd_kernels.aot``."""

import sys

from popsd_kernels.aot.report import main

sys.exit(main())
