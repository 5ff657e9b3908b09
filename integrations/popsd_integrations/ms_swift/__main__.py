"""``python -m popsd_integrations.ms_swift [purified|opsd]`` prints the plugin file for ``swift rlhf --external_plugins``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

PLUGINS = {path.stem.removeprefix("popsd_"): path for path in (Path(__file__).parent / "plugins").glob("popsd_*.py")}


def main(arguments: Sequence[str]) -> str:
    """The path. Raises SystemExit for a name that is none of ``PLUGINS``."""
    name, *others = [*arguments, "purified"][: max(len(arguments), 1)]
    if others or name not in PLUGINS:
        raise SystemExit(f"plugin: expected one of {sorted(PLUGINS)}; got {' '.join(arguments)!r}.")
    return str(PLUGINS[name])


if __name__ == "__main__":
    print(main(sys.argv[1:]))
