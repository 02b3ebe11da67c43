"""Knowledge."""

TASKS = ()
