"""training/fit.py: what a training run keeps when it is resumed."""

from types import SimpleNamespace

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from data.folders import ImageFolder
from data.loaders import TransformedDataset
from models.checkpoints import save_checkpoint
from training.fit import label_order


@pytest.mark.parametrize("resumed", [False, True])
def test_a_resumed_run_keeps_its_order_of_classes(tmp_path, resumed):
    """Labels of folders named by numbers once followed their order as strings; a run that began so goes on so."""
    for number in range(12):
        (tmp_path / "set" / str(number)).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / str(number) / "0.png")
    (tmp_path / "set" / "0" / "._0.png").write_bytes(b"x")
    before, lines = sorted(map(str, range(12))), []
    save_checkpoint(tmp_path / "last.pt", {"classes": before})
    loaders = [
        DataLoader(TransformedDataset(ImageFolder(tmp_path / "set"), lambda image: image), batch_size=None)
        for _ in range(2)
    ]
    run = SimpleNamespace(folder=tmp_path, resumed=resumed, log=lines.append)
    classes = label_order(*loaders, run)
    assert classes == (before if resumed else [str(number) for number in range(12)])
    for loader in loaders:
        for place in range(12):
            path, _ = loader.dataset.base.samples[place]
            assert classes[loader.dataset[place].labels] == path.split("/")[-2]
    assert len(lines) == 1 and "passed over 2 hidden" in lines[0]
