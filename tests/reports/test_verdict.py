"""reports/verdict.py: the first words of a report follow from its numbers, or from the attack's own claim."""

import math

import pytest

from reports.verdict import of_block, of_claims, of_images, of_masks, of_range, of_sentences

NOTHING = {"psnr": 10.0, "psnr_patches": 11.0, "psnr_visible": 10.0, "psnr_baseline": 12.0}


@pytest.mark.parametrize(
    ("changes", "lead"),
    [
        ([{"psnr": 40.0}], "The image comes back"),
        ([{"psnr": math.inf}, {"psnr": 26.0}], "Every image comes back"),
        ([{"psnr": 40.0}, {}], "1 of 2 images come back"),
        ([{"psnr_patches": 50.0}, {}], "Images come back in another order of their patches"),
        ([{"psnr_visible": 16.0}, {}], "Parts of images come back"),
        ([{"psnr": 24.0, "psnr_patches": 25.5, "psnr_visible": 24.0}], "Parts of the image come back"),
        ([{}, {}], "No image comes back"),
        ([{"psnr": math.nan, "psnr_visible": math.nan}], "No image comes back"),
    ],
)
def test_verdicts_count_scores(changes, lead):
    rows = [NOTHING | change for change in changes]
    says = of_images("april", rows, 25.0)
    assert says.startswith(f"{lead}: april reconstructs ") and f"of {len(rows)} image" in says


@pytest.mark.parametrize(
    ("exact", "words"),
    [
        ([True, True], "Every image comes back, says the attack"),
        ([True, False], "1 of 2 images come back, says the attack"),
        ([False, False], "does not claim that its equations determine any of 2 images"),
        ([None, None], "makes no claim of its own"),
    ],
)
def test_without_originals_the_attack_speaks_for_itself(exact, words):
    assert words in of_claims("april", [{} if one is None else {"exact": one} for one in exact])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"exact": False, "hidden": 5}], "1 of 1 image up to rounding and up to the order of hidden patches."),
        ([{"exact": False}], "up to rounding and up to the order of patches that share a position."),
        ([{"exact": False, "hidden": 5}, {"exact": True}],
         "2 of 2 images up to rounding and, 1 image of them, up to the order of hidden patches."),
        ([{"exact": True}], "1 of 1 image up to rounding. There"),
    ],
)  # fmt: skip
def test_a_claim_up_to_the_order_of_hidden_patches_says_so(rows, words):
    assert words in of_claims("joint", [row | {"exact_up_to_order": True} for row in rows])


@pytest.mark.parametrize(
    ("anywhere", "in_place", "words"),
    [
        ((100, 100), (100, 90), "Every sentence comes back: tag finds 100 % of the tokens of 2 sentences"),
        (
            (100, 100),
            (40, 30),
            "Every word comes back: tag finds 100 % of the tokens of 2 sentences, in any order, and",
        ),
        ((99.99, 100), (40, 30), "Most words come back: tag finds 99.995 %"),
        ((0, 30), (0, 0), "Some words come back: tag finds 15.0 %"),
        ((0, 0), (0, 0), "No word comes back: tag finds 0 %"),
    ],
)
def test_sentences_lead_with_words_in_any_order(anywhere, in_place, words):
    rows = [{"tokens_any_order": one, "tokens_in_place": two} for one, two in zip(anywhere, in_place, strict=True)]
    says = of_sentences("tag", rows, 85.0)
    assert says.startswith(words) and "of 2 sentences in order (more than 85 % of the tokens in place)" in says


def test_images_whose_mask_hides_nothing_are_counted():
    rows = [{"psnr_masked": value} for value in (None, math.nan, 12.0, math.inf)]
    assert of_masks(rows[2:]) == ""
    assert of_masks(rows) == (
        " 2 of 4 images had a mask that hides no patch, and leak as without MJP (smaller blocks: --min_block)."
    )


def test_claims_that_pixels_refute_lead_to_the_normalisation():
    assert of_range([{}, {"exact": True}]) == ""
    assert "outside 0 to 1, by up to 0.25: are --mean and --std" in of_range([{"outside": 0.25}, {"outside": 0.1}, {}])


def test_claims_that_the_first_block_refutes_lead_to_weights_and_order():
    assert of_block([{}, {"exact": True}]) == ""
    says = of_block([{"unexplained": 0.01}, {"contrast": math.nan}, {"exact": True}])
    assert "No claim is made of 2 images" in says and "weights of the round" in says
