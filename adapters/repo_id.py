"""What can be the name of a repository on the hub."""

from __future__ import annotations

import re


def is_repo_id(name: str) -> bool:
    """Whether it has the form owner/name, which no path has that is absolute, begins with a dot or has blanks in it."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII) is not None
