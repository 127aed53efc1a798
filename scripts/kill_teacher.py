"""Kills a lesson at random moments, many times, and says what that cost: nothing but time.

    PYTHONPATH=tests python scripts/kill_teacher.py     # 200 kills over 1,000 requests: 10 minutes

The server answers after some milliseconds, with faults in between, and counts for itself.
"""

import argparse
import json
import tempfile
from pathlib import Path

from paid_lesson import CONCURRENCY, survive


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills a lesson at random moments.")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        seen = survive(path, size=arguments.requests, kills=arguments.kills, seed=arguments.seed)
    seen["in_flight"] = CONCURRENCY
    if arguments.json:
        print(json.dumps(seen))
        return
    for name, value in seen.items():
        print(f"{name.replace('_', ' ')}: {value}")


if __name__ == "__main__":
    main()
