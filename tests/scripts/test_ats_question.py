"""scripts/ats_question.py: what it prints of the policies that the search likes best."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "ats_question.py"


def test_a_quarter_of_one_policy_has_no_spread(capsys):
    rows = [{"psnr_input": 10.0 + place, "psnr": 5.0, "aware": 7.0} for place in range(4)]
    runpy.run_path(str(SCRIPT), run_name="script_under_test")["print_quarters"](rows)
    best, rest = capsys.readouterr().out.splitlines()
    assert best == "best quarter by S_pri (n = 1): psnr_input 10.00, psnr 5.00, aware 7.00"
    assert rest == "the rest (n = 3): psnr_input 12.00 ± 1.00, psnr 5.00 ± 0.00, aware 7.00 ± 0.00"
