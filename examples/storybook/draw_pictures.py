# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Stage 0: draw all pictures and build the tokenizer, so that stages that need the same ones can start at once."""

from common import SETS, SIZE, arguments, build_tokenizer, load_set
from train_classifier import PREVIEWS


def main():
    args = arguments(__doc__, steps=0, batch_size=0, learning_rate=0.0).parse_args()
    if not (args.work_dir / "tokenizer").is_dir():
        build_tokenizer(args.work_dir / "tokenizer")
    for split in SETS:
        load_set(split, args.work_dir)
    for split, count in (("world", None), ("world_held_out", None), ("emotion", PREVIEWS)):
        load_set(split, args.work_dir, SIZE, count)


if __name__ == "__main__":
    main()
