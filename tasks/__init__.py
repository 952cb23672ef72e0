"""The work of every phase, and the contracts between them.

A phase is a folder: `task.py` holds its Prefect tasks, the modules beside it know no Prefect.
Phases do not import each other; what they share stands here: the run manifest, the dataset layout,
the coverage document, settings, errors, and the op modules in `tasks.ops`.
"""
