"""What `make demo` finds, as JSON: the digits network under every contestant, frozen and tested; the README's table.

    python benchmarks/digits.py                           # three seeds, 400 steps; minutes on one core

Times are no part of it: `step_time.py` measures those.
"""

from __future__ import annotations

from dataclasses import replace

import harness

from nm_compiler.demo.settings import Settings
from nm_compiler.demo.train import run


def main() -> None:
    """Run the demo and write what it found."""
    options = harness.arguments(__doc__ or "", "digits").parse_args()
    started = harness.environment(1)
    settings = replace(Settings(), seeds=1, epochs=2) if options.quick else Settings()
    outcome = run(settings)
    rows = [
        {
            "method": row.entry.method,
            "pattern": row.entry.pattern and str(row.entry.pattern),
            "accuracy": row.accuracy,
            "deviation": row.deviation,
            "by_seed": [each.accuracy for each in outcome.of(row.entry)],
            "retained": row.retained,
            "exact": list(row.exact),
        }
        for row in outcome.rows()
    ]
    harness.write(options.out, started, {"steps": outcome.steps, "sizes": list(outcome.sizes), "rows": rows})
    print(outcome)


if __name__ == "__main__":
    main()
