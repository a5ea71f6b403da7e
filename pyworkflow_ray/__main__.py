"""`python -m pyworkflow_ray`: the same as the command `pyworkflow-ray`."""

from pyworkflow_ray.cli.main import main

if __name__ == "__main__":
    main()
