"""A checkout over a few hundred orders, against services that fail as services do, killed with SIGKILL on the way.

`main.run_demo` is called by the command line (`pyworkflow-ray demo`) and by nothing else; it uses the public api only.
"""
