"""reports/audit.py: what an audit says first, and why prediction and measurement differ."""

import math

from reports.audit import _verdict, write_audit
from reports.audit_parts import disagreements, merged
from utils.summary import summarise


def row(attack: str, *decibels: float, baseline: float = 12.0, **about) -> dict:
    scores = [{"psnr": value, "psnr_baseline": baseline, "ssim": 0.5, "psnr_visible": value} for value in decibels]
    scores = [row | {"psnr_patches": about.pop("patches", row["psnr"])} for row in scores]
    summaries = {key: summarise(scores, key) for key in scores[0]} if scores else {"psnr": summarise([], "psnr")}
    return {"attack": attack, "why": "" if decibels else "needs more", "budget": "seconds", "seconds": 1.0} | {
        "exact": False,
        "proved": 0.0,
        "exact_up_to_order": about.get("exact", False),
        **summaries,
        **about,
    }


def found(*rows: dict, best: str | None = None, shapes: dict | None = None) -> dict:
    model = {"name": "vit", "parameters": 9, "shared": 9, "frozen": "", "image": "8 x 8", "values": 192, "classes": 2}
    model |= {"options": "--model vit", "of_leaks": "--model vit"}
    model |= {"images": ["a.png"], "batch_size": 1, "mask_ratio": 0.0, "flops": 1}
    return {
        "model": model,
        "attacks": list(rows),
        "best": best,
        "labels": [],
        "features": [],
        "mask": None,
        "defenses": [],
    } | {
        "shapes": shapes or {"why": "none"},
        "success_psnr": 25.0,
        "seconds": 1.0,
        "minutes": 5.0,
        "cut": [],
    }


def verdict(what: dict) -> str:
    return str(_verdict(what, next((one for one in what["attacks"] if one["attack"] == what["best"]), None)))


def test_what_recovered_nothing_is_named_with_what_was_not_tried():
    text = verdict(found(row("dlg", 12.5), row("rgap", 11.0), row("april"), best="dlg"))
    assert "attacks dlg and rgap recovered no image" in text and "Not measured: april" in text
    assert "attack dlg recovered no image" in verdict(found(row("dlg", 12.5), best="dlg"))
    assert "No attack on images was measured" in verdict(found(row("april")))


def test_patches_in_another_order_are_not_called_nothing():
    """Without positions nothing tells places: the picture looks like noise, and its patches are there."""
    what = found(row("idlg", 12.5), row("joint", 9.5, patches=60.0, proved=99.0), best="idlg")
    assert "Patches of the image come back" in verdict(what) and "99 % of the bits" in verdict(what)
    assert "60.0 dB" in verdict(what) and "recovered no image" not in verdict(what)


def test_counting_is_about_what_is_shared(tmp_path):
    """A head alone has fewer numbers than the image, whatever the network has."""
    what = found(row("idlg", 12.0), best="idlg")
    for shared, words in ((9, "fewer than would fix them all"), (192, "counting alone does not protect")):
        what["model"] |= {"parameters": 1000, "shared": shared}
        write_audit(tmp_path, what)
        assert f"has {shared} numbers for the 192 of an image: {words}" in (tmp_path / "audit.html").read_text()


def test_rows_that_no_label_rule_could_read_count_no_labels(tmp_path):
    read = {"images": 1, "rule": "yin", "why": "", "read": summarise([{"x": 100.0}], "x")}
    for rows, words in (([read], "The gradient of the last layer counts"), ([], "no rule could here")):
        write_audit(tmp_path, found(row("idlg", 12.0), best="idlg") | {"labels": rows})
        assert words in (tmp_path / "audit.html").read_text()


def test_a_perfect_copy_is_measured_and_is_the_best(tmp_path):
    what = found(row("closed_form", math.inf, math.inf, exact=True), row("dlg", 300.0), best="closed_form")
    assert "The image comes back" in verdict(what) and "perfect" in verdict(what)
    write_audit(tmp_path, what)
    page = (tmp_path / "audit.html").read_text()
    assert "perfect, infinite" in page and "None" not in page


def test_what_was_cut_short_stands_on_the_page(tmp_path):
    what = found(row("idlg", 18.0), best="idlg") | {"cut": ["idlg: 2 of 4 gradients in the 9 s it had"], "minutes": 0.5}
    write_audit(tmp_path, what)
    page = (tmp_path / "audit.html").read_text()
    assert "idlg: 2 of 4 gradients in the 9 s it had" in page and "1 seconds of at most 30 (audit.py --minutes)" in page
    write_audit(tmp_path, what | {"cut": ["defences: images not attacked, as idlg recovers nothing in 3 s"]})
    assert "The time of this audit was short (defences: images not attacked" in (tmp_path / "audit.html").read_text()


def test_a_row_that_cannot_be_exact_says_why(tmp_path):
    what = found(row("token_span", 18.0, limits="cannot determine the image, as <so>"), best="token_span")
    write_audit(tmp_path, what)
    assert "not exact: cannot determine the image, as &lt;so&gt;" in (tmp_path / "audit.html").read_text()


def test_a_row_that_is_exact_up_to_order_says_so(tmp_path):
    write_audit(tmp_path, found(row("joint", 18.0, exact_up_to_order=True), best="joint"))
    assert "exact up to the order of patches that share a position" in (tmp_path / "audit.html").read_text()


def test_prediction_and_measurement_differ_only_with_a_reason():
    said = [{"attack": "mjp_aware", "exact": True, "open_visible": 0}, {"attack": "joint", "exact": False}]
    said[1]["open_visible"] = 12
    for claims in ({"exact": True}, {"exact_up_to_order": True}):
        agree = found(row("mjp_aware", 90.0, **claims), row("joint", 20.0), shapes={"attacks": said})
        assert disagreements(agree) == []
    differ = found(row("mjp_aware", 36.0), row("joint", 90.0, exact=True), shapes={"attacks": said})
    first, second = disagreements(differ)
    assert "mjp_aware" in first and "36.0 dB" in first and "joint" in second and "12 numbers" in second


def test_rows_alike_but_for_a_name_are_one_row():
    rows = [["a", 1, "x"], ["b", 2, "x"], ["c", 1, "x"]]
    assert merged(rows, 0) == [["a, c", 1, "x"], ["b", 2, "x"]]
    assert merged(rows, 1) == [["a", "1", "x"], ["b", "2", "x"], ["c", "1", "x"]]
