"""The figures of an evaluation: that they show the numbers that they are of."""

import json
import math
import statistics
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from muse_examples.contact_sheets import EMOTION_COLORS, PAPER
from muse_examples.evaluation.figures import (
    ROLES,
    example_sheet,
    feature_map_figure,
    inner_loop_figure,
    label_colors,
    label_offsets,
    mean_curves,
    read_trace,
    role_shares,
    scatter_figure,
    threshold_figure,
    trace_record,
    tsne,
)
from muse_examples.evaluation.measures import Estimate
from muse_examples.evaluation.tables import Column, percent_column
from muse_examples.plots import confusion_figure, save_figure
from PIL import Image

from pipeline_muse import MIKELS_WHEEL, MuseTrace, wheel_neighbors


LABELS = list(MIKELS_WHEEL)
ACCURACY = percent_column("emo_b", "Emo-B accuracy")
CLIP = Column("clip", "CLIP score", digits=2, better="higher")


def make_trace(target, inherent, lengths, seed=0, kept=-1) -> MuseTrace:
    """A trace of random probabilities, with so many iterates per step, of which the last is kept, or `kept`."""
    source = np.random.default_rng(seed)
    probabilities = [source.dirichlet(np.ones(8), length).tolist() for length in lengths]
    return MuseTrace(
        LABELS,
        {target: 1.0},
        gate_step=3 if lengths else None,
        inherent_emotion=inherent,
        probabilities=probabilities,
        kept=[length - 1 if kept < 0 else kept for length in lengths],
        inner_steps=sum(lengths) - len(lengths),
    )


def entry_of(trace) -> dict:
    (emotion,) = trace.emotion
    return {"emotion": emotion, "trace": trace_record(trace)}


def texts_of(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# --------------------------------------------------------------------------------------
# Figure 2
# --------------------------------------------------------------------------------------


def test_traces_survive_their_record(pipe):
    call = {"num_inference_steps": 4, "semantic_threshold": 0.0, "max_inner_steps": 2}
    (trace,) = pipe("a", emotion="awe", **call).trace
    entry = json.loads(json.dumps(trace_record(trace)))
    read = read_trace(entry)
    for name in ("labels", "emotion", "gate_step", "inherent_emotion", "kept", "inner_steps"):
        assert getattr(read, name) == getattr(trace, name), name
    assert len(read.probabilities) == 4 and trace.inner_steps > 0
    for step, own in zip(trace.probabilities, read.probabilities):
        np.testing.assert_allclose(own, step, atol=5e-5)
    assert read.target_probability == pytest.approx(trace.target_probability, abs=5e-5)
    assert len(json.dumps(entry["probabilities"])) < 10 * sum(map(len, trace.probabilities)) * len(trace.labels)
    assert read_trace(entry | {"emotion": "awe"}).emotion == {"awe": 1.0}


def test_curves_are_means_of_aligned_steps():
    """By hand: a loop that ended early goes on with what it kept, and two of three pictures reach the second step."""
    traces = [
        make_trace("awe", "fear", [3, 1], seed=1),
        make_trace("fear", "awe", [2, 2, 4], seed=2, kept=0),
        make_trace("anger", "anger", [1], seed=3),
        make_trace("awe", None, []),
    ]
    curves, starts = mean_curves(traces)
    assert starts == [0, 3]
    p = [[[dict(zip(LABELS, iterate)) for iterate in step] for step in trace.probabilities] for trace in traces]
    first, second, third = p[:3]
    iterates = [
        [first[0][0], second[0][0], third[0][0]],
        [first[0][1], second[0][1], third[0][0]],
        [first[0][2], second[0][0], third[0][0]],
        [first[1][0], second[1][0]],
        [first[1][0], second[1][1]],
    ]
    targets = [[one[label] for one, label in zip(there, ("awe", "fear", "anger"))] for there in iterates]
    assert curves["target"].mean == pytest.approx([statistics.mean(own) for own in targets])
    half = [1.959964 * statistics.stdev(own) / math.sqrt(len(own)) for own in targets]
    assert curves["target"].high - curves["target"].mean == pytest.approx(half)
    low = [max(0, statistics.mean(own) - one) for own, one in zip(targets, half)]
    assert curves["target"].low == pytest.approx(low)
    inherent = [statistics.mean([there[0]["fear"], there[1]["awe"]]) for there in iterates]
    assert curves["inherent"].mean == pytest.approx(inherent), "without the third, which evoked its target"
    near = {label: wheel_neighbors(label) for label in ("awe", "fear", "anger")}
    assert near["awe"] == ["contentment", "excitement"]
    similar = [
        [statistics.mean(one[other] for other in near[label]) for one, label in zip(there, near)] for there in iterates
    ]
    assert curves["similar"].mean == pytest.approx([statistics.mean(own) for own in similar])


def test_curves_of_few_pictures():
    assert mean_curves([make_trace("awe", None, [])]) == ({}, [])
    trace = make_trace("awe", "awe", [2, 1])
    trace.emotion = {"cozy": 1.0}
    trace.labels = ["cozy", *LABELS[1:]]
    curves, _ = mean_curves([trace])
    assert sorted(curves) == ["inherent", "target"], "nothing is near an emotion that is not on the wheel"
    assert (curves["target"].low == curves["target"].mean).all() and len(curves["target"].mean) == 3


def test_the_figure_of_the_inner_loop():
    rows = {
        name: [entry_of(make_trace("awe", "fear", [3, 2], seed=seed)) for seed in seeds]
        for name, seeds in {"MUSE": range(4), "without both": range(4, 6)}.items()
    }
    rows["closed"] = [entry_of(make_trace("awe", None, []))] * 3
    rows["stock"] = [{"emotion": "awe", "inherent_emotion": "fear"}, {"emotion": "awe"}]
    answers = {"MUSE": ["awe", "awe", "fear", "contentment"], "stock": ["fear", "fear"]}
    figure = inner_loop_figure(rows, answers, "Emo-B")
    *panels, bars = [axes for part in figure.subfigs for axes in part.axes]
    assert [axes.get_title().splitlines() for axes in panels] == [
        ["MUSE", "(4 pictures)"],
        ["without both", "(2 pictures)"],
        ["closed", "(the gate opened in 0 of 3 pictures)"],
    ]
    for name, axes in zip(rows, panels[:2]):
        curves, _ = mean_curves([read_trace(entry["trace"]) for entry in rows[name]])
        lines = {line.get_label(): line for line in axes.lines if line.get_label() in ROLES}
        assert lines.keys() == curves.keys() == {"target", "inherent", "similar"}
        for role, curve in curves.items():
            assert list(lines[role].get_ydata()) == list(curve.mean)
            assert to_hex(lines[role].get_color()) == ROLES[role]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"] and axes.get_ylim() == (0, 1)
    assert texts_of(panels[2]) == ["no gate ever opened"]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["MUSE", "stock"]
    widths = [patch.get_width() for patch in bars.patches]  # role by role, of both rows
    assert widths == [50, 0, 25, 50, 25, 0, 0, 50]
    assert [to_hex(patch.get_facecolor()) for patch in bars.patches[::2]] == list(ROLES.values())
    assert figure.subfigs[1]._suptitle.get_text() == "Final pictures, as Emo-B sees them"


def test_figures_of_the_inner_loop_of_one_kind():
    trace = entry_of(make_trace("awe", "fear", [2]))
    assert len(inner_loop_figure({"MUSE": [trace]}).subfigs) == 1
    assert len(inner_loop_figure({"stock": [{"emotion": "awe"}]}, {"stock": ["awe"]}).subfigs) == 1
    with pytest.raises(ValueError, match="no answers"):
        inner_loop_figure({"stock": [{"emotion": "awe"}]})
    with pytest.raises(ValueError, match="'MUSE' has 1 pictures but 2 answers of Emo-B"):
        inner_loop_figure({"MUSE": [trace]}, {"MUSE": ["awe", "awe"]}, "Emo-B")


def test_roles_by_hand():
    records = [
        {"emotion": "awe", "inherent_emotion": "contentment"},
        {"emotion": {"awe": 0.5, "fear": 0.5}, "trace": None},
        {"emotion": "fear", "trace": {"inherent_emotion": "anger"}},
        {"emotion": "cozy"},
        {"emotion": None},
    ]
    found = role_shares(records, ["contentment", "fear", "sadness", "awe", "awe"])
    assert found == {"target": 0.2, "inherent": 0.2, "similar": 0.2, "other": 0.4}


@pytest.mark.parametrize("number", [1, 4, 7])
def test_no_text_of_the_panels_overlaps(number):
    rows = {
        f"MUSE without the term number {k}": [entry_of(make_trace("awe", "fear", [11] * 40))] for k in range(number)
    }
    figure = inner_loop_figure(rows, {name: ["awe"] for name in rows}, "Emo-B")
    figure.draw_without_rendering()
    boxes = []
    for part in figure.subfigs:
        boxes += [part._suptitle.get_window_extent()] if part._suptitle else []
        for axes in part.axes:
            texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
            legend = axes.get_legend()
            texts += legend.get_texts() if legend else []
            boxes += [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) > 10 * number
    for index, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[:index])


# --------------------------------------------------------------------------------------
# Figure 4
# --------------------------------------------------------------------------------------


def clusters(number, seed=0):
    """Features of so many pictures in two clusters that are far from each other, and their emotions."""
    source = np.random.default_rng(seed)
    emotions = ["awe", "cozy"] * (number // 2)
    centers = np.array([[100.0 * (emotion == "awe"), 0, 0] for emotion in emotions])
    return centers + source.random((number, 3)), emotions


def test_feature_maps():
    rows = {name: clusters(12, seed) for seed, name in enumerate(("stock", "MUSE", "MUSE, η = 0", "mine"))}
    figure = feature_map_figure(rows, {"stock": Estimate(0.25, 0.1, 0.4), "MUSE": 0.0625})
    assert [axes.get_title().splitlines()[0] for axes in figure.axes] == list(rows)
    assert [axes.get_title().splitlines()[1] for axes in figure.axes] == [
        f"intra-class variance {value}" for value in ("0.250", "0.062", "–", "–")
    ]
    places = tsne(np.concatenate([features for features, _ in rows.values()]))
    for number, axes in enumerate(figure.axes):
        background, own = axes.collections[:2]
        assert np.array_equal(background.get_offsets(), places)
        assert np.array_equal(own.get_offsets(), places[12 * number : 12 * number + 12])
        assert [to_hex(color) for color in own.get_facecolors()] == [EMOTION_COLORS["awe"], to_hex("C0")] * 6
        assert axes.get_xlim() == figure.axes[0].get_xlim()
        (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
        assert x1 - x0 == pytest.approx(y1 - y0) and (places > [x0, y0]).all() and (places < [x1, y1]).all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["awe", "cozy"]


def test_a_layout_keeps_what_is_near_together_and_is_the_same_every_time():
    features, _ = clusters(20)
    places = tsne(features)
    assert np.array_equal(places, tsne(features)) and places.shape == (20, 2)
    distances = np.linalg.norm(places[:, None] - places, axis=-1)
    same = np.equal.outer(np.arange(20) % 2, np.arange(20) % 2)
    assert distances[same].max() < distances[~same].min()
    assert tsne(features[:4]).shape == (4, 2)
    with pytest.raises(ValueError, match="needs 4 pictures, got 3"):
        tsne(features[:3])
    with pytest.raises(ValueError, match="got 0"):
        feature_map_figure({})


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        tsne(clusters(8)[0])


def test_colors_of_labels():
    colors = label_colors(["zeal", "fear", "cozy", "awe", "fear"])
    assert list(colors.items()) == [
        *((label, EMOTION_COLORS[label]) for label in ("awe", "fear")),
        *(("cozy", "C0"), ("zeal", "C1")),
    ]


# --------------------------------------------------------------------------------------
# Figure 5, and all rows
# --------------------------------------------------------------------------------------


def test_the_figure_of_the_threshold():
    rows = {
        math.inf: {"emo_b": Estimate(0.125, 0.1, 0.2), "clip": 27.0},
        0.0: {"emo_b": Estimate(0.9, 0.8, 0.95), "clip": Estimate(24, 23, 25)},
        12.5: {"emo_b": Estimate(0.75, 0.7, 0.8), "clip": None},
    }
    pictures = {value: Image.new("RGB", (40, 20), color) for value, color in ((0.0, "navy"), (math.inf, "gold"))}
    figure = threshold_figure(rows, ACCURACY, CLIP, pictures, "“a fox”, awe")
    plot, other, *shown = figure.axes
    assert [label.get_text() for label in plot.get_xticklabels()] == ["η = 0", "η = 12.5", "never (η = ∞)"]
    (accuracy,) = [line for line in plot.lines if line.get_label() == "Emo-B accuracy (%)"]
    assert list(accuracy.get_xdata()) == [0, 1, 2] and list(accuracy.get_ydata()) == pytest.approx([90, 75, 12.5])
    (content,) = [line for line in other.lines if line.get_label() == "CLIP score"]
    assert list(content.get_xdata()) == [0, 2] and list(content.get_ydata()) == [24, 27]
    assert [text.get_text() for text in plot.get_legend().get_texts()] == ["Emo-B accuracy (%)", "CLIP score"]
    bars = plot.collections[0].get_segments()
    assert [segment[:, 1].tolist() for segment in bars] == [pytest.approx(e) for e in ([80, 95], [70, 80], [10, 20])]
    assert [text.get_text() for text in figure.texts] == ["“a fox”, awe"]
    assert [axes.images[0].get_array()[0, 0].tolist() for axes in shown] == [[0, 0, 128], [255, 215, 0]]
    for place, axes in zip((0, 2), shown):  # each below its tick, in its own proportions
        tick = figure.transFigure.inverted().transform(plot.transData.transform((place, 0)))[0]
        box = axes.get_position(original=True)
        assert (box.x0 + box.x1) / 2 == pytest.approx(tick) and box.y1 < plot.get_position().y0
        width, height = box.width * figure.get_figwidth(), box.height * figure.get_figheight()
        assert width == pytest.approx(2 * height)
    assert len(threshold_figure({0.0: rows[0.0]}, ACCURACY, CLIP).axes) == 2
    with pytest.raises(ValueError, match="no thresholds"):
        threshold_figure({}, ACCURACY, CLIP)


def test_the_scatter_of_all_rows():
    table = {
        "stock": {"emo_b": Estimate(0.125, 0.1, 0.2), "clip": 27.0},
        "MUSE": {"emo_b": Estimate(0.8, 0.7, 0.9), "clip": Estimate(25.0, 24.5, 25.25)},
        "lacks": {"emo_b": 0.5, "clip": None},
        "not a number": {"emo_b": 0.5, "clip": math.nan},
    }
    figure = scatter_figure(table, CLIP, ACCURACY, "Generation")
    (axes,) = figure.axes
    assert [points.get_offsets().tolist() for points in axes.collections] == [[[27, 12.5]], [[25, 80]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1  stock", "2  MUSE"]
    assert sorted(texts_of(axes)) == ["1", "2"]
    across, up = axes.lines[2:]
    assert list(across.get_xdata()) == [24.5, 25.25] and list(across.get_ydata()) == [80, 80]
    assert list(up.get_xdata()) == [25, 25] and list(up.get_ydata()) == pytest.approx([70, 90])
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == (
        *("CLIP score", "Emo-B accuracy (%)", "Generation"),
    )
    colors = {to_hex(points.get_facecolor()[0]) for points in axes.collections}
    assert colors < set(EMOTION_COLORS.values()) and len(colors) == 2
    with pytest.raises(ValueError, match="No row has both 'CLIP score' and 'Emo-B accuracy"):
        scatter_figure({"lacks": table["lacks"]}, CLIP, ACCURACY)


def test_rows_of_a_scatter_look_unlike_each_other():
    table = {str(k): {"emo_b": 0.5, "clip": float(k)} for k in range(30)}
    (axes,) = scatter_figure(table, CLIP, ACCURACY).axes
    looks = {
        (to_hex(points.get_facecolor()[0]), points.get_paths()[0].vertices.tobytes()) for points in axes.collections
    }
    assert len(looks) == 30


def test_numbers_beside_points_are_apart():
    points = np.array([[0.0, 0], [0, 0], [4, 3], [2, -5], [200, 200]])
    places = points + label_offsets(points)
    gaps = [math.dist(a, b) for k, a in enumerate(places) for b in places[:k]]
    assert min(gaps) > 8
    assert min(math.dist(place, point) for place in places for point in points) > 5


def test_a_confusion_is_in_per_cent_of_what_was_meant():
    figure = confusion_figure([[3, 1, 0], [0, 0, 0]], ["awe", "fear"], ["awe", "fear", "joy"], "as Emo-B sees it")
    (axes,) = figure.axes
    assert texts_of(axes) == ["75", "25", "0", "0", "0", "0"]
    assert axes.images[0].get_array().tolist() == [[75, 25, 0], [0, 0, 0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["awe (4)", "fear (0)"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["awe", "fear", "joy"]
    assert axes.get_title() == "as Emo-B sees it"


def test_a_sheet_of_examples(tmp_path):
    Image.new("RGB", (192, 192), "navy").save(tmp_path / "navy.png")
    rows = {"stock": [Image.new("RGB", (192, 192), "gold"), None], "MUSE": [tmp_path / "navy.png"] * 2}
    sheet = example_sheet(rows, [("a fox", "awe"), ("a house in the park that is too long for one line", None)])
    assert sheet.width == 20 + 2 * 212
    colors = [[sheet.getpixel((116 + 212 * column, 160 + 254 * row)) for column in (0, 1)] for row in (0, 1)]
    paper = Image.new("RGB", (1, 1), PAPER).getpixel((0, 0))
    assert colors == [[(255, 215, 0), paper], [(0, 0, 128)] * 2]
    short = example_sheet(rows, [("a fox", "awe"), ("a house", None)])
    assert short.height < sheet.height, "each prompt has as many lines as it takes"
    strip = short.crop((0, 0, short.width, 30)).convert("L")
    assert np.asarray(strip)[:, 232:330].min() < 100, "the second prompt stands above the second column"
    with pytest.raises(ValueError, match="'stock' has 2 pictures of 1"):
        example_sheet(rows, [("a fox", "awe")])
    with pytest.raises(ValueError, match="no pictures"):
        example_sheet({"stock": [None]}, [("a fox", "awe")])


def test_figures_are_written_whole_in_the_format_of_their_suffix(tmp_path):
    figure = confusion_figure([[1]], ["awe"])
    assert save_figure(figure, tmp_path / "new" / "confusion.png") == tmp_path / "new" / "confusion.png"
    with Image.open(tmp_path / "new" / "confusion.png") as image:
        assert image.format == "PNG" and image.width > 200
        assert "#{:02x}{:02x}{:02x}".format(*image.convert("RGB").getpixel((2, 2))) == PAPER
    assert save_figure(figure, tmp_path / "confusion.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="nosuch"):
        save_figure(figure, tmp_path / "confusion.nosuch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.pdf", "new"]
