"""One value of a function, in a process of its own: python -m crm.tuning.calculate FOLDER NUMBER MODULE:NAME JSON"""

import importlib
import json
import sys
import traceback
from pathlib import Path

from crm.records import identity, write_json


def main(folder: str, number: str, function: str, values: str) -> None:
    """Writes what the function returns, or why it raised, to NUMBER.json; NUMBER.claim.json says who is at it."""
    path = Path(folder) / f"{number}.json"
    write_json(path.with_suffix(".claim.json"), identity())
    module, _, name = function.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)(json.loads(values))
        write_json(
            path, {"values": [float(value) for value in (found if isinstance(found, (tuple, list)) else [found])]}
        )
    except Exception as error:
        write_json(path, {"reason": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})


if __name__ == "__main__":
    main(*sys.argv[1:])
