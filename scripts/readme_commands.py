"""Print the commands of a README: the contents of its ```sh blocks, in order. `.ci/run` executes what this prints.

Usage: python scripts/readme_commands.py README.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)

if __name__ == "__main__":
    print("\n".join(BLOCK.findall(Path(sys.argv[1]).read_text())), end="")
