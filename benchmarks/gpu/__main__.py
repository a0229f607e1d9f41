import sys

from benchmarks.gpu.check import main

sys.exit(main(sys.argv[1:]))
