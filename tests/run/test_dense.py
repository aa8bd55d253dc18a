import pytest

import evoprune
from evoprune.results.folder import Folder
from evoprune.results.written import CONFIG, DENSE
from evoprune.run import dense


@pytest.mark.parametrize(("given", "rate", "said"), [
    ({}, 0.01, "training"), ({"weights": True}, 0.001, "adapting"),
    ({"weights": True, "learning_rate": 0.02}, 0.02, "adapting")])
def test_trained_weights_are_adapted_gently(given, rate, said, weights_file, tmp_path, monkeypatch, caplog):
    rates, usual = [], dense.tune

    def tune(net, train, recipe, **rest):
        rates.append(recipe.learning_rate)
        return usual(net, train, recipe, **rest)

    monkeypatch.setattr(dense, "tune", tune)
    caplog.set_level("INFO", "evoprune")
    settings = {**given, **({"weights": weights_file} if "weights" in given else {})}
    evoprune.prune(out=tmp_path / "run", train_epochs=1, train_images=100, search_images=50, population=4, generations=1,
                   threads=1, **settings)
    assert rates == [pytest.approx(rate)] and f"{said} the dense model: 1 epoch of 100 images" in caplog.text


def test_a_run_killed_when_its_dense_model_was_just_written_goes_on_with_workers(tmp_path, monkeypatch):
    settings = {"train_epochs": 1, "train_images": 100, "search_images": 50, "population": 4, "generations": 1, "threads": 1}
    usual = Folder.write

    def killed(folder, name, content):
        if name == CONFIG and (folder.path / DENSE).exists():
            raise KeyboardInterrupt
        usual(folder, name, content)

    def interrupted(*given, **rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dense, "tune", interrupted)
        evoprune.prune(out=tmp_path / "run", **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Folder, "write", killed)
        evoprune.prune(resume=tmp_path / "run")
    assert (tmp_path / "run" / DENSE).exists()
    assert evoprune.prune(resume=tmp_path / "run", engine="processes", workers=1).finished
    evoprune.prune(out=tmp_path / "whole", **settings)
    assert (tmp_path / "run" / "front.csv").read_bytes() == (tmp_path / "whole" / "front.csv").read_bytes()
