# These files run in a process of their own, by `run.py`; here there is nothing to collect, not even doctests.
collect_ignore_glob = ["*.py"]
