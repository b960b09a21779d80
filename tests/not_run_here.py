"""What no machine of ours can run, and who does; the tests' last lines name it."""

NOT_RUN_HERE = {
    "mysql": "MySQL itself has no Debian package: set IDEM_TASKS_TEST_MYSQL_URL (the workflow's MySQL job does)",
}
