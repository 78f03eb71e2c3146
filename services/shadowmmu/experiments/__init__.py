"""Experiments: sweeps over parameters, their tables and findings, cost models, and the catalogue of runs.

What a user needs, in that order:

| module | for |
| --- | --- |
| `spec` | `load_spec`: an experiment's file, checked |
| `engine` | `run_sweep`: its points executed, here or on Dask |
| `results` | `open_sweep`: the folder of a sweep, its table and failures |
| `findings` | `findings_of`: answer, tables and charts of a sweep |
| `catalogue` | `enter`, `Catalogue`: what runs there were |

Nothing is imported here: `results` and `findings` need the extra `experiments`, the catalogue needs none.
"""
