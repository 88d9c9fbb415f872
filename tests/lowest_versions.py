"""Print the lowest declared version of each dependency, as constraints for pip."""

import re
import tomllib
from pathlib import Path

if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for dependency in project["dependencies"]:
        print(re.sub(r"^([\w-]+)(?:\[\w+\])?>=([\w.]+).*", r"\1==\2", dependency))
