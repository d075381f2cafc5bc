"""Identifiability among a pool: who is nearest, and pools that say little."""

import pytest
import torch

from data.demo import write_picture
from eval.identifiability import identified, main
from utils.errors import UserError


def pictures(number: int, seed: int) -> torch.Tensor:
    return torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_reconstruction_is_identified_where_its_own_original_is_nearest():
    originals, pool = pictures(4, 0), pictures(30, 1)
    found = originals + 0.01
    found[2] = pool[7] + 0.01  # nearer to another
    assert identified(found, originals, pool).tolist() == [True, True, False, True]
    assert identified(found, originals, torch.cat([pool, originals[:1]])).tolist() == [True, True, False, True]


def test_small_pools_are_refused():
    with pytest.raises(UserError, match="a pool of 5 pictures says little"):
        identified(pictures(1, 0), pictures(1, 0), pictures(5, 1))


def test_the_command_states_the_pool(tmp_path, capsys):
    from torchvision.transforms.functional import to_pil_image

    for name, number, seed in (("found", 2, 0), ("own", 2, 0), ("pool", 25, 1)):
        for place, picture in enumerate(pictures(number, seed)):
            write_picture(tmp_path / name / f"{place}.png", to_pil_image(picture))
    folders = ["--source_dir", str(tmp_path / "found"), "--target_dir", str(tmp_path / "own")]
    main([*folders, "--pool", str(tmp_path / "pool")])
    assert "identifiability: 1 of 2 images" in (shown := capsys.readouterr().out) and "among 25 others" in shown


def test_pictures_of_several_sizes_are_one_clear_line(tmp_path):
    from torchvision.transforms.functional import to_pil_image

    for name, side in (("found", 8), ("own", 8), ("pool", 9)):
        write_picture(tmp_path / name / "0.png", to_pil_image(torch.zeros(3, side, side)))
    folders = ["--source_dir", str(tmp_path / "found"), "--target_dir", str(tmp_path / "own")]
    with pytest.raises(UserError, match="bring all to one size"):
        main([*folders, "--pool", str(tmp_path / "pool")])
