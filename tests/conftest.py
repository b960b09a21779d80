"""What all tests have: servers (services/fixtures.py), and last lines on what was skipped and what was proved."""

pytest_plugins = ["tests.services.fixtures", "tests.skip_list", "tests.explorer.proof_summary"]
