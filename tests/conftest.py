"""What all tests have: servers (services/fixtures.py) and the list of what was skipped (skip_list.py)."""

pytest_plugins = ["tests.services.fixtures", "tests.skip_list"]
