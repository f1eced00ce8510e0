# SPDX-License-Identifier: Apache-2.0
"""Every kernel against float64, on the device, or in Triton's interpreter where there is none.

    python -m bench.gpu.verify [decode pack ...]    # exit status 1 if a check fails

Arenas are poisoned with 0xFF and raw pages with NaN wherever no token was written.
"""

from __future__ import annotations

import argparse
import json
import sys

from bench.gpu import device
from bench.gpu.verify.run import GROUPS, run_group


def main() -> None:
    """Run groups of checks in this process, one line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--small", action="store_true", help="small inputs only")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(unknown)}")
    red = False
    for group in options.groups or GROUPS:
        for record in run_group(group, device.chosen(), large=not options.small):
            red |= not record["passed"]
            print(json.dumps(record), flush=True)
    sys.exit(red)


if __name__ == "__main__":
    main()
