# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Draws Mikels' wheel of emotions, and where they lie by valence and arousal.

python examples/emotion_wheel.py --output outputs/emotion_wheel.png
"""

import argparse
import math
from pathlib import Path

from muse_examples.contact_sheets import FAINT, INK, PAPER
from muse_examples.options import one_line_errors

from pipeline_muse import MIKELS_WHEEL


def draw(path: Path) -> Path:
    """Draws the wheel, and the places of its emotions by valence and arousal; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(10, 4.6), facecolor=PAPER, layout="constrained")
    wheel, plane = figure.add_subplot(121, projection="polar"), figure.add_subplot(122, facecolor=PAPER)
    sector = 2 * math.pi / len(MIKELS_WHEEL)
    points = MIKELS_WHEEL.values()
    for number, (label, (valence, arousal, color)) in enumerate(MIKELS_WHEEL.items()):
        wheel.bar((number + 0.5) * sector, 1.5, 0.97 * sector, bottom=0.7, color=color)
        wheel.text((number + 0.5) * sector, 1.55, label, fontsize=9, color="white", ha="center", va="center")
        crowded = any(0 < other.valence - valence < 0.6 and abs(other.arousal - arousal) < 0.5 for other in points)
        plane.scatter(valence, arousal, s=90, color=color)
        shift, side = (-0.2, "right") if crowded else (0.2, "left")
        plane.text(valence + shift, arousal, label, color=color, ha=side, va="center")
    wheel.set(theta_zero_location="N", theta_direction=-1, ylim=(0, 2.2))  # from noon: positive ones right
    wheel.set_axis_off()
    plane.axhline(5, color=FAINT, linewidth=0.8, zorder=0)
    plane.axvline(5, color=FAINT, linewidth=0.8, zorder=0)
    plane.set(xlim=(1, 10), xticks=range(1, 10), ylim=(1, 9), xlabel="valence", ylabel="arousal")
    plane.set_title("Ratings of the words (Warriner et al., 2013)", color=INK, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


@one_line_errors
def main() -> None:
    """Draws the wheel of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/emotion_wheel.png"), help="Default: %(default)s.")
    print(draw(parser.parse_args().output))


if __name__ == "__main__":
    main()
