"""What can be the name of a repository on the hub."""

from __future__ import annotations


def is_repo_id(name: str) -> bool:
    """Whether it has the form owner/name, which no path has that is absolute or begins with a dot."""
    return name.count("/") == 1 and not name.startswith((".", "/"))
