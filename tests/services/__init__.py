"""Real servers for the tests: found or started, shared by the run, and gone when it ends.

`fixtures.py` is what tests see. `finding.py` decides where a server comes from. One file a server says how that
server is started. `run.py` and `reaper.py` see to it that nothing outlives the run, however the run ends.
"""
