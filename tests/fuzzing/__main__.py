"""`python -m fuzzing`, as scripts/fuzz runs it."""

import sys
import warnings

warnings.simplefilter("ignore")  # torch's and megatron-core's own, on import

from fuzzing.campaign import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
