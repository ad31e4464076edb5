"""Each figure of a row against a value that is computed here in another way."""

import itertools
import random
import sys
import warnings

import numpy as np
import pytest
import scipy.linalg
import tiny_models
import torch
from muse_examples.evaluation import measures
from muse_examples.evaluation.measures import Estimate, Statistics


sys.path.append(str(tiny_models.REPOSITORY / "examples" / "storybook"))
from common import frechet_distance  # noqa: E402


LABELS = ["amusement", "anger", "awe", "fear"]


@pytest.fixture
def source():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def one_hot(*answers: str) -> np.ndarray:
    """Probabilities of a classifier that gives these answers."""
    return np.array([[0.7 if label == answer else 0.1 for label in LABELS] for answer in answers])


def angle(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.dot(first, second) / np.linalg.norm(first) / np.linalg.norm(second))


# --------------------------------------------------------------------------------------
# Figures with an interval
# --------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_resampled_groups(source):
    sizes = [1, 2, 3, 8, 2, 4, 6, 1, 5, 3]
    groups = [f"prompt {number}" for number, size in enumerate(sizes) for _ in range(size)]
    values = np.concatenate([number + source.normal(size=size) for number, size in enumerate(sizes)])
    found = measures.mean_estimate(values, groups, resamples=4000)

    chosen = [values[np.array(groups) == group] for group in dict.fromkeys(groups)]
    picker, means = random.Random(1), []
    for _ in range(4000):
        drawn = np.concatenate(picker.choices(chosen, k=len(chosen)))
        means.append(drawn.mean())
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.15)
    alone = measures.mean_estimate(values)
    assert alone.high - alone.low < 0.75 * (found.high - found.low), "alike pictures tell less than as many others"


def test_the_interval_does_not_depend_on_order_names_or_run(source):
    values, groups = source.normal(size=24), [number % 6 for number in range(24)]
    found = measures.mean_estimate(values, groups)
    assert found == measures.mean_estimate(list(values), [f"group {group}" for group in groups])
    assert found != measures.mean_estimate(values, groups, seed=1)
    assert found.low < found.value < found.high


def test_a_mean_of_many_groups_is_resampled_in_parts(source, monkeypatch):
    values = source.normal(size=500)
    whole = measures.mean_estimate(values)
    monkeypatch.setattr(measures, "AT_A_TIME", 5000)
    parts = measures.mean_estimate(values)
    assert parts.value == whole.value and parts.low == pytest.approx(whole.low, abs=0.02)


def test_means_that_tell_little_are_no_trouble():
    assert measures.mean_estimate([]) is None
    assert measures.mean_estimate([], []) is None
    assert measures.mean_estimate([0.25]) == Estimate(0.25, None, None)
    assert measures.mean_estimate([0, 1, 1, 0], ["one prompt"] * 4) == Estimate(0.5, None, None)
    assert measures.mean_estimate([0.1] * 3) == Estimate(0.1, 0.1, 0.1)
    assert measures.mean_estimate([1, 1, 1, 1], [0, 0, 0, 1]) == Estimate(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="finite"):
        measures.mean_estimate([1.0, float("nan")])
    with pytest.raises(ValueError, match="1 `groups` of 2 `values`"):
        measures.mean_estimate([1.0, 2.0], ["a"])


def test_a_block_per_emotion_is_the_mean_of_each():
    values, emotions = [1, 0, 1, 1, 0, 0], ["fear", "awe", "fear", "awe", "fear", "anger"]
    groups = [0, 0, 1, 1, 2, 2]
    found = measures.estimates_by(values, emotions, groups)
    assert list(found) == ["fear", "awe", "anger"]
    assert found["fear"] == measures.mean_estimate([1, 1, 0], [0, 1, 2])
    assert found["awe"] == measures.mean_estimate([0, 1], [0, 1])
    assert found["anger"] == Estimate(0.0)
    alike = measures.estimates_by([1, 0, 1], ["awe"] * 3, ["one"] * 3)
    assert alike["awe"].low is None and measures.estimates_by([1, 0, 1], ["awe"] * 3)["awe"].low is not None


# --------------------------------------------------------------------------------------
# Emotions
# --------------------------------------------------------------------------------------


def test_accuracy_counts_answers_that_were_intended():
    probabilities = one_hot("awe", "fear", "awe", "anger")
    answers = measures.answers_of(probabilities, LABELS)
    assert answers == ["awe", "fear", "awe", "anger"]
    assert measures.right(answers, ["awe", "awe", "awe", "fear"]).tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError):
        measures.right(answers, ["awe"])


def test_accuracy_on_copies_counts_the_share_of_each_picture():
    copies = [["awe", "awe", "fear", "awe"], ["fear"] * 4]
    assert measures.right_of_copies(copies, ["awe", "awe"]).tolist() == [0.75, 0]


def test_the_confusion_has_intentions_in_rows():
    found = measures.confusion(one_hot("awe", "fear", "awe", "awe"), LABELS, ["awe", "awe", "fear", "awe"])
    expected = np.zeros((4, 4))
    expected[LABELS.index("awe"), LABELS.index("awe")] = 2
    expected[LABELS.index("awe"), LABELS.index("fear")] = 1
    expected[LABELS.index("fear"), LABELS.index("awe")] = 1
    assert found.tolist() == expected.tolist()
    with pytest.raises(ValueError, match="knows no joy"):
        measures.confusion(one_hot("awe"), LABELS, ["joy"])


def test_valence_is_right_where_the_sign_is():
    probabilities = one_hot("amusement", "fear", "anger", "awe")
    intended = ["awe", "awe", "fear", "anger"]
    assert measures.right_valence(probabilities, LABELS, intended).tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="neutral"):
        measures.right_valence(probabilities, [*LABELS[:3], "neutral"], intended)


def test_published_valence_is_that_of_summed_probabilities():
    probabilities = np.array([[0.3, 0.4, 0.3, 0.0], [0.1, 0.5, 0.3, 0.1]])  # amusement, anger, awe, fear
    assert measures.right_valence(probabilities, LABELS, ["awe", "awe"]).tolist() == [0, 0]
    assert measures.right_valence(probabilities, LABELS, ["awe", "awe"], "published").tolist() == [1, 0]


def test_emo_s_is_what_editing_adds_to_the_target(source):
    before, after = source.dirichlet(np.ones(4), size=(2, 5))
    targets = ["awe", "fear", "awe", "amusement", "anger"]
    expected = [after[k][LABELS.index(name)] - before[k][LABELS.index(name)] for k, name in enumerate(targets)]
    assert measures.emo_s(before, after, LABELS, targets) == pytest.approx(expected)


# --------------------------------------------------------------------------------------
# Content
# --------------------------------------------------------------------------------------


def test_cosines_are_of_pairs_and_take_zeros(source):
    first, second = source.normal(size=(2, 6, 5)).astype(np.float16)
    expected = [angle(a.astype(float), b.astype(float)) for a, b in zip(first, second)]
    assert measures.cosine(first, second) == pytest.approx(expected)
    assert measures.cosine(np.zeros((1, 3)), np.ones((1, 3))).tolist() == [0]


def test_content_of_captions_is_right_above_the_threshold():
    text = np.array([[1.0, 0.0]] * 3)
    image = np.array([[0.16, (1 - 0.16**2) ** 0.5], [0.14, (1 - 0.14**2) ** 0.5], [3.0, 0.0]])
    prompts = ["A dog on the ground.", "A cat on the floor.", "A cup on a table."]
    assert measures.right_content(image, text, prompts).tolist() == [1, 0, 1]
    assert measures.right_content(image, text, prompts, threshold=0.5).tolist() == [0, 0, 1]


def test_content_of_elements_is_right_among_the_nearest(source):
    names = [f"a photo of a {name}" for name in ("dog", "bird", "car", "tree", "book", "wall", "sky", "toy")]
    features = dict(zip(names, source.normal(size=(8, 6))))
    prompts = [names[number % 8] for number in range(40)] + ["A dog on the ground."]
    text = np.stack([*(features[name] for name in prompts[:-1]), np.ones(6)])
    image = text + source.normal(scale=3, size=text.shape)
    for top_k in (1, 5):
        expected = []
        for own, prompt in zip(image[:-1], prompts):
            nearest = sorted(names, key=lambda name, own=own: -angle(own, features[name]))[:top_k]
            expected.append(float(prompt in nearest))
        found = measures.right_content(image, text, prompts, top_k=top_k)
        assert found[:-1].tolist() == expected and 0 < sum(expected) < 40
        assert found[-1] == (angle(image[-1], text[-1]) > 0.15)
    # Fewer pictures, but all elements of the test set: each is still one of eight.
    few = measures.right_content(image[:3], text[:3], prompts[:3], features, top_k=1)
    assert few.tolist() == measures.right_content(image, text, prompts, top_k=1)[:3].tolist()
    assert measures.right_content(image[:3], text[:3], prompts[:3], top_k=3).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="a photo of a bird"):
        measures.right_content(image[:3], text[:3], prompts[:3], {names[0]: features[names[0]]})


# --------------------------------------------------------------------------------------
# The Frechet distance
# --------------------------------------------------------------------------------------


def test_the_frechet_distance_is_that_of_matrix_roots(source):
    first = source.normal(size=(60, 5)) @ source.normal(size=(5, 5))
    second = source.normal(size=(80, 5)) @ source.normal(size=(5, 5)) + 1
    one, other = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    shift = np.square(first.mean(0) - second.mean(0)).sum()
    expected = shift + np.trace(one + other - 2 * scipy.linalg.sqrtm(one @ other).real)
    assert measures.frechet_distance(Statistics.of(first), Statistics.of(second)) == pytest.approx(expected)
    assert measures.frechet_distance(Statistics.of(first), Statistics.of(first)) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_of_two_gaussians_by_hand():
    first = Statistics(np.array([0.0, 0.0]), np.diag([4.0, 0.0]))
    second = Statistics(np.array([3.0, 0.0]), np.diag([1.0, 9.0]))
    assert measures.frechet_distance(first, second) == pytest.approx(9 + (2 - 1) ** 2 + 9)


def test_the_frechet_distance_agrees_with_storybooks(source):
    first, second = source.normal(size=(2, 40, 8))
    expected = frechet_distance(torch.from_numpy(first), torch.from_numpy(second))
    assert measures.frechet_distance(Statistics.of(first), Statistics.of(second)) == pytest.approx(expected)


def test_statistics_of_batches_are_those_of_all(source):
    features = (source.normal(size=(50, 4)) * [1, 5, 0.1, 20] + 1000).astype(np.float32)
    whole = Statistics.of(features)
    assert whole.mean == pytest.approx(features.astype(float).mean(0))
    assert whole.covariance == pytest.approx(np.cov(features.astype(float), rowvar=False))
    parts = Statistics.of(part for part in (features[:1], features[1:17], features[17:17], features[17:]))
    assert parts.count == whole.count == 50
    assert parts.mean == pytest.approx(whole.mean) and parts.covariance == pytest.approx(whole.covariance)
    with pytest.raises(ValueError, match="two pictures at least, got 1"):
        Statistics.of(features[:1])


def test_statistics_are_read_from_files_of_other_tools(source, tmp_path):
    features = source.normal(size=(20, 3))
    np.savez(tmp_path / "other.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    other = Statistics.load(tmp_path / "other.npz")
    assert other.count is None and not other.few
    Statistics.of(features).save(tmp_path / "own.npz", note="ours")
    own = Statistics.load(tmp_path / "own.npz")
    assert own.count == 20
    assert own.mean == pytest.approx(other.mean) and own.covariance == pytest.approx(other.covariance)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.npz", "own.npz"]


def test_other_files_are_no_statistics(source, tmp_path):
    np.savez(tmp_path / "features.npz", features=np.ones((2, 2)))
    np.save(tmp_path / "array.npz.npy", np.ones(3))
    np.savez(tmp_path / "shapes.npz", mu=np.ones(3), sigma=np.ones((2, 2)))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "features.npz").read_bytes()[:80])
    (tmp_path / "empty.npz").write_bytes(b"")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=path.name):
            Statistics.load(path)


def test_too_few_pictures_for_the_dimensions_are_told(source):
    enough, few = (Statistics.of(source.normal(size=(count, 6))) for count in (7, 6))
    assert measures.frechet_distance(enough, enough) >= 0
    with pytest.warns(UserWarning, match="6 pictures are too few for 6 dimensions"):
        measures.frechet_distance(enough, few)
    with pytest.raises(ValueError, match="6 and 2 dimensions"):
        measures.frechet_distance(enough, Statistics.of(source.normal(size=(9, 2))))


# --------------------------------------------------------------------------------------
# Diversity
# --------------------------------------------------------------------------------------

EMOTIONS = ["fear"] * 5 + ["awe"] * 4 + ["joy"] * 3 + ["anger"]


@pytest.mark.parametrize(("measure", "dimensions"), [("cosine", 1), ("mse", 1), ("cosine", 7), ("mse", 7)])
def test_semantic_diversity_is_the_mean_over_pairs_and_emotions(source, measure, dimensions):
    features = (10 + source.normal(size=(len(EMOTIONS), dimensions))).astype(np.float32)
    expected = {}
    for emotion in ("fear", "awe", "joy"):  # of anger there is no pair
        own = [row.astype(float) for row, name in zip(features, EMOTIONS) if name == emotion]
        pairs = list(itertools.combinations(own, 2))
        distances = [1 - angle(a, b) if measure == "cosine" else np.mean((a - b) ** 2) for a, b in pairs]
        expected[emotion] = np.mean(distances)
    found = measures.semantic_diversity(features, EMOTIONS, measure)
    assert found.by_emotion == pytest.approx(expected)
    assert found.value == pytest.approx(np.mean(list(expected.values())))
    assert measures.semantic_diversity(features[-1:], ["anger"]).value is None
    with pytest.raises(ValueError, match="measure"):
        measures.semantic_diversity(features, EMOTIONS, "euclid")
    with pytest.raises(ValueError, match="variant"):
        measures.semantic_diversity(features, EMOTIONS, measure, "wrong")


@pytest.mark.parametrize("measure", ["cosine", "mse"])
def test_published_diversity_mixes_an_emotion_with_those_before_it(measure):
    # Pictures of an emotion are all alike, so that only pairs of different emotions are apart.
    features = np.repeat(np.eye(3), 20, axis=0)
    emotions = ["fear"] * 20 + ["amusement"] * 20 + ["awe"] * 20
    corrected = measures.semantic_diversity(features, emotions, measure)
    assert list(corrected.by_emotion.values()) == pytest.approx([0, 0, 0])
    published = measures.semantic_diversity(features, emotions, measure, "published", pairs=4000)
    apart = 1.0 if measure == "cosine" else 2 / 3
    assert list(published.by_emotion) == ["amusement", "awe", "fear"], "the order of the script"
    # Of pairs of 20, 40 and 60 pictures: what share is of two different emotions
    expected = [0, apart * 20 / 39, apart * 40 / 59]
    assert list(published.by_emotion.values()) == pytest.approx(expected, abs=0.03)
    few = measures.semantic_diversity(features, emotions, measure, "published")
    assert few == measures.semantic_diversity(features, emotions, measure, "published", seed=0)
    assert few != measures.semantic_diversity(features, emotions, measure, "published", seed=1)


def test_published_diversity_draws_ten_pairs_of_two_pictures():
    seen = []
    measures.pair_diversity(range(6), ["awe"] * 3 + ["fear"] * 3, lambda a, b: seen.append((a, b)) or 0.0, "published")
    assert len(seen) == 20 and all(a != b for a, b in seen)
    assert {item for pair in seen[:10] for item in pair} == {0, 1, 2}
    assert {item for pair in seen[10:] for item in pair} == {0, 1, 2, 3, 4, 5}


def test_pairs_can_be_drawn_instead_of_taken_all():
    seen = []

    def distance(first: int, second: int) -> float:
        seen.append((first, second))
        return abs(first - second)

    found = measures.pair_diversity(range(12), ["awe"] * 12, distance)
    assert seen == list(itertools.combinations(range(12), 2))
    assert found.value == pytest.approx(np.mean([b - a for a, b in seen]))
    seen.clear()
    measures.pair_diversity(range(12), ["awe"] * 12, distance, pairs=20)
    assert len(seen) == len(set(seen)) == 20 and all(first < second for first, second in seen)
    assert {first for first, _ in seen} != {0, 1}, "not those that come first"


def test_the_variance_within_a_class_is_that_of_directions(source):
    features = source.normal(size=(len(EMOTIONS), 4))
    expected = {}
    for emotion in ("fear", "awe", "joy"):
        own = np.array([row / np.linalg.norm(row) for row, name in zip(features, EMOTIONS) if name == emotion])
        expected[emotion] = np.mean([np.sum((row - own.mean(0)) ** 2) for row in own])
    found = measures.intra_class_variance(features, EMOTIONS)
    assert found.by_emotion == pytest.approx(expected) and found.value == pytest.approx(np.mean([*expected.values()]))
    assert measures.intra_class_variance(9 * features, EMOTIONS).value == pytest.approx(found.value)


# --------------------------------------------------------------------------------------
# Pixels
# --------------------------------------------------------------------------------------


def pictures(source, count: int) -> np.ndarray:
    return source.integers(0, 256, size=(count, 5, 6, 3), dtype=np.uint8)


def test_lpips_is_fed_as_it_wants_or_as_published(source):
    picture = pictures(source, 1)[0]
    picture[0, 0], picture[0, 1] = 0, 255
    pixels = measures.network_pixels(picture)
    assert pixels.shape == (3, 5, 6) and pixels.dtype == np.float32
    assert pixels[:, 0, 0].tolist() == [-1] * 3 and pixels[:, 0, 1].tolist() == [1] * 3
    assert pixels[1, 3, 2] == pytest.approx(picture[3, 2, 1] / 127.5 - 1)
    published = measures.network_pixels(picture, "published")
    assert published[:, 0, 0].tolist() == [0] * 3 and published[:, 0, 1].tolist() == [1] * 3


def test_perceptual_diversity_is_of_pairs_of_one_emotion(source):
    shown, emotions = pictures(source, 6), ["awe"] * 3 + ["fear"] * 3
    floats = shown.astype(float)

    def distance(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.abs(first - second).mean())

    found = measures.perceptual_diversity(list(shown), emotions, distance)
    for emotion, numbers in {"awe": range(3), "fear": range(3, 6)}.items():
        pairs = itertools.combinations(numbers, 2)
        expected = np.mean([np.abs(floats[a] - floats[b]).mean() / 127.5 for a, b in pairs])
        assert found.by_emotion[emotion] == pytest.approx(expected, rel=1e-5)
    published = measures.perceptual_diversity(list(shown), emotions, distance, "published", pairs=2000)
    assert published.by_emotion["awe"] == pytest.approx(found.by_emotion["awe"] / 2, rel=0.05), "half the range"
    with pytest.raises(ValueError, match="cannot be compared"):
        measures.perceptual_diversity([shown[0], shown[1][:4]], ["awe"] * 2, distance)


def test_the_perceptual_distance_of_an_edit_is_fed_by_variant(source):
    edit, before = pictures(source, 2)
    seen = []
    for variant in measures.VARIANTS:
        measures.perceptual_distance(edit, before, lambda *pair: seen.append(pair) or 0.0, variant)
        assert np.array_equal(seen[-1][0], measures.network_pixels(edit, variant))
        assert np.array_equal(seen[-1][1], measures.network_pixels(before, variant))
    assert seen[0][0].min() < 0 <= seen[1][0].min()


def test_the_squared_error_of_eight_bits_wraps_only_where_published():
    edit = np.array([[[10, 200, 0]]], dtype=np.uint8)
    before = np.array([[[12, 180, 255]]], dtype=np.uint8)
    assert measures.squared_error(edit, before) == pytest.approx((2**2 + 20**2 + 255**2) / 3)
    # In 8 bits: 10 - 12 is 254, whose square is 64516, 4 beyond 252 times 256; 400 is 144; 0 - 255 is 1.
    assert measures.squared_error(edit, before, "published") == pytest.approx((4 + 144 + 1) / 3)
    with pytest.raises(ValueError, match="cannot be compared"):
        measures.squared_error(edit, np.zeros((1, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="variant"):
        measures.squared_error(edit, before, "wrong")
