"""The folder of a packaged base, as JSON."""

from __future__ import annotations

import json
import sys

from slimtune.storage.source import resolve

if __name__ == "__main__":
    print(json.dumps({"folder": resolve(sys.argv[1])}))
