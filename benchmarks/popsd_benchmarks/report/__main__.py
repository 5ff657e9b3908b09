import sys

from popsd_benchmarks.report.page import main

sys.exit(main())
