"""The zygote's process: ``python -m everstep.worker.zygote CONTROL LISTENER OWNER …``."""

import sys

from everstep.worker.zygote.process import main

if __name__ == "__main__":
    main(sys.argv[1:])
