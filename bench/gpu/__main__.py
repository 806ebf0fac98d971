"""Run the check of the CUDA path."""

import sys

from bench.gpu.check import main

sys.exit(main())
