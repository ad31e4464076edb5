# Copyright 2026 The MUSE pipelines authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Mikels' wheel of emotions: draws it, and says how grave a classifier's mistakes are by it.

python examples/emotion_wheel.py --output outputs/emotion_wheel.png
"""

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

from sheets import FAINT, INK, PAPER

from pipeline_muse import MIKELS_WHEEL, wheel_distance


def ecc_emc(answers: Iterable[tuple[str, str]]) -> tuple[float, float]:
    """
    Two measures of "To err like human" (NeurIPS 2024), Eq. 3 and 4, on its polarity-aware distance.

    Args:
        answers (iterable of `tuple[str, str]`): Pairs of the true and the predicted emotion, both on the wheel.

    Returns:
        `tuple[float, float]`: Emotion confusion confidence, in which a mistake counts the less the further it is off
        (1 if there is none), and emotional misclassification confidence, the same among mistakes only (1 if all are
        beside the truth; not a number if there are none).

    Raises:
        ValueError: If there are no answers, or one is off the wheel.
    """
    distances = [wheel_distance(truth, answer, polarity_aware=True) for truth, answer in answers]
    if not distances:
        raise ValueError("`answers` has to hold at least one pair of emotions.")
    mistakes = [distance for distance in distances if distance > 0]
    ecc = sum(1 / (1 + distance) for distance in distances) / len(distances)
    return ecc, sum(1 / distance for distance in mistakes) / len(mistakes) if mistakes else math.nan


def draw(path: Path) -> Path:
    """Draws the wheel, and the places of its emotions by valence and arousal; returns the path."""
    import matplotlib  # here, as the measures above do without

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


def main() -> None:
    """Draws the wheel of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/emotion_wheel.png"), help="Default: %(default)s.")
    print(draw(parser.parse_args().output))


if __name__ == "__main__":
    main()
