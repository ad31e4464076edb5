# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The paper's tables and figures, on any base: Stable Diffusion 1.x, 2.x or XL.

accelerate launch examples/evaluate.py --table generation --base stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --captions captions_val2017.json --images_per_emotion 700 --dtype float16 \
    --classifier emo_a=path/or/id emo_b=path/or/id emo_c=path/or/id --guide emo_a --output_dir results/sd15
python examples/evaluate.py --table editing --images photos --captions captions_val2017.json --images_per_emotion 200 …

Tables: `generation` and `editing` compare MUSE with other methods, `terms` its loss with and without each term and no
optimisation, `thresholds` the semantic gate's, and `guides` the classifiers that guide. Several may be named.

It has three stages, which `--stage` runs one by one: `make` the pictures, shared among the processes that accelerate
starts; `judge` them; `report` tables (Markdown, CSV, LaTeX) and figures. Each goes on where it ended, and new judges
need no new pictures. `--dry_run` prints the plan: pictures, network calls, hours.

Pictures of other programs are judged under the same protocol, `--folder emogen=path`, and a method of your own is a
function in a file, `--methods FILE`; see muse_examples/evaluation/methods.py. How each column is computed, and what
the paper did: docs/columns.md.
"""

from muse_examples.evaluation.command import main


if __name__ == "__main__":
    main(description=__doc__)
