"""Print the requirements of one group of pyproject.toml, one a line: `runtime`, or an optional group by its name."""

import sys
import tomllib

with open("pyproject.toml", "rb") as f:
    project = tomllib.load(f)["project"]
group = sys.argv[1]
print("\n".join(project["dependencies"] if group == "runtime" else project["optional-dependencies"][group]))
