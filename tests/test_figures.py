import math

import pytest

from vllm_ext.reports.figures import Figure, Scored, accuracy, agreement, is_right, normalised, perplexity

# Two passages of three tokens; the second model is as sure of the first and half as sure of each token of the second.
STOCK = [Scored([math.log(0.5)] * 3, [1, 2, 3]), Scored([math.log(0.25)] * 3, [4, 5, 6])]
OURS = [Scored([math.log(0.5)] * 3, [1, 2, 3]), Scored([math.log(0.125)] * 3, [4, 0, 0])]


def test_perplexity_is_the_geometric_mean_over_all_tokens():
    assert perplexity(STOCK, None, seed=0) == Figure(pytest.approx(math.sqrt(8)), 2)
    figure = perplexity(OURS, STOCK, seed=0)
    assert figure.value == pytest.approx(4)
    assert figure.ratio == pytest.approx(math.sqrt(2))


def test_intervals_are_over_passages_taken_in_pairs():
    # A resample holds the first passage twice, each once, or the second twice.
    assert perplexity(OURS, STOCK, seed=0).interval == pytest.approx((1, 2))
    assert perplexity(STOCK * 20, STOCK * 20, seed=0).interval == (1, 1)
    low, high = perplexity(OURS * 50, STOCK * 50, seed=0).interval
    assert 1.3 < low < math.sqrt(2) < high < 1.55
    assert perplexity(OURS[:1], STOCK[:1], seed=0).interval is None


def test_agreement_counts_places_with_the_same_top_token():
    assert agreement(STOCK, STOCK, seed=0) == Figure(1, 2, None, (1, 1))
    assert agreement(OURS, STOCK, seed=0).value == pytest.approx(4 / 6)


def test_accuracy_beside_a_stock_model():
    assert accuracy([1, 0, 0, 1], None, seed=0) == Figure(0.5, 4)
    figure = accuracy([1, 0, 0, 1] * 25, [1, 1, 1, 1] * 25, seed=0)
    assert (figure.value, figure.items, figure.ratio) == (0.5, 100, 0.5)
    assert 0.38 < figure.interval[0] < 0.5 < figure.interval[1] < 0.62


def test_items_of_one_text_are_resampled_together():
    """As if each text were one item, whatever the number of its items."""
    ours, stock = [1, 0, 0, 1] * 5, [1, 1, 0, 1] * 5
    alone = accuracy(ours, stock, seed=0)
    repeated = accuracy(
        [each for each in ours for _ in range(4)], [each for each in stock for _ in range(4)], 0, [4] * 20
    )
    assert (repeated.ratio, repeated.interval) == (alone.ratio, alone.interval)
    assert repeated.items == 80
    uneven = accuracy([1, 1, 0, 0], [1, 1, 1, 1], 0, [3, 1])
    assert (uneven.ratio, uneven.interval) == (0.5, (0.0, 2 / 3))


def test_there_is_no_ratio_to_nothing_right():
    assert accuracy([1, 0], [0, 0], seed=0) == Figure(0.5, 2)
    # Some resamples have nothing right: then there is no interval.
    assert accuracy([1, 0], [1, 0], seed=0) == Figure(0.5, 2, 1, None)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (" Paris\nQ: What is the capital of Chile?", "Paris"),
        (" Paris.", "Paris"),
        ("PARIS", "Paris"),
        (" Bogota\n", "Bogotá"),
        (" Washington, D.C.\n", "Washington D.C."),
        ("\n Port-au-Prince", "Port-au-Prince"),
    ],
)
def test_right_capitals(answer, wanted):
    assert is_right("capitals", answer, wanted)


@pytest.mark.parametrize("answer", ["", "\n", " ", " Paris, Texas\n", " Par", " London\nParis"])
def test_wrong_capitals(answer):
    assert not is_right("capitals", answer, "Paris")


def test_sums_count_by_their_first_word():
    assert is_right("sums", " 46\n12 + 3", "46")
    assert is_right("sums", " 46, 12 + 3", "46")
    assert is_right("sums", " 46 12", "46")
    for answer in ("", " 460\n", " 4 6", " 4", " -46", "= 46"):
        assert not is_right("sums", answer, "46")


def test_normalised():
    assert normalised("  São\tTomé! ") == "sao tome"
    assert normalised("N'Djamena") == "ndjamena"
