"""`python -m idem_tasks` is `idem-tasks`."""

from idem_tasks.cli import main

if __name__ == "__main__":
    main()
