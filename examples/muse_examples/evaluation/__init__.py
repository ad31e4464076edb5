# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The paper's tables and figures, on any base: what `examples/evaluate.py` runs.

- `command`: options, rows and stages
- `data`: test sets, and what each row of a table is asked to make
- `methods`: the rows; a row is a name and a function that makes pictures of jobs
- `universal_guidance`, `rivals`: rows that MUSE is compared with
- `making`: the pictures of all rows, shared among processes, resumed after a kill
- `judges`: what classifiers, CLIPs and feature extractors say of pictures, kept in files
- `measures`: from what they say to the figures of a row
- `reporting`: the tables and figures of a run
- `tables`, `figures`: Markdown, CSV, LaTeX and plots
"""
