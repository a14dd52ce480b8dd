"""Files from people who mean harm: nothing in them is run, and what they call things stays text."""

import contextlib
import csv
import importlib
import io
import pickle
import re
import sys
from pathlib import Path

import jsonargparse
import pytest
import yaml

import finetune
from finetune import FinetuneModule, trusted_code
from finetune.errors import CheckpointError, ConfigError
from finetune.escaping import cell, from_cell, shown
from finetune.main import main
from finetune.outcomes import read_outcome
from finetune.trusted_code import guarding, in_working_folder, require_trusted

pytestmark = pytest.mark.filterwarnings("ignore:.*no pretrained weights.*")


@pytest.fixture
def hostile(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(trusted_code, "_trusted", set())
    monkeypatch.syspath_prepend(str(Path(finetune.__file__).parent.parent / "benchmarks"))
    yield importlib.import_module("hostile")
    for name in ("hostile", "damage"):
        sys.modules.pop(name, None)


def test_nothing_in_hostile_files_is_run(hostile, tmp_path):
    (tmp_path / "pictures").mkdir()
    hostile.picture(0).save(tmp_path / "pictures" / "0.png")
    attacks = list(hostile.attacks(tmp_path))
    assert len({attack.file for attack in attacks}) >= 10
    for attack in attacks:
        code, said = hostile.outcome(attack.words)
        assert not (tmp_path / hostile.HACKED).exists(), attack
        assert code == 2, (attack, code, said)
        assert "error: " in said, attack


def test_the_files_would_do_harm(hostile, tmp_path):
    list(hostile.attacks(tmp_path))
    hacked = tmp_path / hostile.HACKED
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert hacked.exists()
    hacked.unlink()
    words = [*hostile.FIT[:1], *hostile.FIT[3:], "--config", "loads_yaml.yaml"]
    assert hostile.outcome(words)[0] == 2
    assert not hacked.exists()
    hostile.outcome([*words, "--trust", "yaml"])  # what is trusted is run
    assert hacked.exists()


# ----------------------------------------------------------------------------------------------- code of the user's own

NETWORK = """
from pathlib import Path
from torch import nn

Path("imported").touch()


class Net(nn.Sequential):
    def __init__(self, num_classes: int = 4):
        super().__init__(nn.Conv2d(3, 4, 3, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""
QUICK = ["--model.weights", "none", "--data.workers", "0", "--trainer.fast_dev_run", "true"]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package that is installed in an environment within the working folder, and a configuration that names it."""
    site = tmp_path / "venv" / "lib" / "site-packages"
    (site / "their_nets").mkdir(parents=True)
    (site / "their_nets" / "__init__.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(site))
    config = {"model": {"class_path": "finetune.FinetuneModule", "init_args": {"backbone": "their_nets.Net"}}}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(config))
    yield tmp_path / "imported"
    sys.modules.pop("their_nets", None)


def test_what_is_installed_is_shown_before_it_is_imported(hostile, installed):
    code, said = hostile.outcome(["fit", *QUICK, "--config", "theirs.yaml"])
    assert code == 2
    assert "names 'their_nets.Net'" in said
    assert "--trust their_nets" in said
    assert not installed.exists()
    assert hostile.outcome(["fit", *QUICK, "--config", "theirs.yaml", "--trust", "their_nets"])[0] == 0
    assert installed.exists()


def test_trust_reaches_the_parser(hostile, installed, tmp_path):
    package = tmp_path / "venv" / "lib" / "site-packages" / "their_nets" / "__init__.py"
    package.write_text(NETWORK + "\n\nimport lightning as L\n\n\nclass Own(L.Callback):\n    pass\n")
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "their_nets.Own"}]}}))
    words = ["fit", "--model.backbone", "test_resnet", *QUICK, "--config", "theirs.yaml"]
    code, said = hostile.outcome(words)
    assert (code, "--trust their_nets" in said, installed.exists()) == (2, True, False)
    code, said = hostile.outcome([*words, "--trust=their_nets"])
    assert (code, installed.exists()) == (0, True), said


def test_what_the_user_types_is_trusted(hostile, installed):
    assert hostile.outcome(["fit", *QUICK, "--model.backbone", "their_nets.Net"])[0] == 0
    assert hostile.outcome(["stages", "their_nets.Net", "--input", "32"])[0] == 0


def test_what_lies_in_the_working_folder_is_trusted(hostile, tmp_path):
    (tmp_path / "my_net.py").write_text(NETWORK)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"backbone": "my_net.Net"}}}))
    assert hostile.outcome(["fit", *QUICK, "--config", "mine.yaml"])[0] == 0
    (tmp_path / "my_callback.py").write_text("import lightning as L\n\n\nclass Own(L.Callback):\n    pass\n")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "my_callback.Own"}]}}))
    assert hostile.outcome(["fit", "--model.backbone", "test_resnet", *QUICK, "--config", "mine.yaml"])[0] == 0
    sys.modules.pop("my_net", None)
    sys.modules.pop("my_callback", None)


def test_a_folder_does_not_lend_its_name(hostile, tmp_path):
    for name in ("subprocess", "yaml", "numpy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        assert not in_working_folder(name)  # what would be imported lies elsewhere


def test_python_reads_checkpoints_as_carefully(hostile, tmp_path, installed):
    hostile.checkpoint(tmp_path / "a.ckpt", options={"backbone": "their_nets.Net"})
    with pytest.raises(ConfigError, match=r"names 'their_nets\.Net'.*trusted_code\.trust\('their_nets'\)"):
        FinetuneModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert not installed.exists()
    trusted_code.trust("their_nets")
    with pytest.raises(CheckpointError, match=r"do not fit its model: .* is missing; .* is not known"):  # of another network
        FinetuneModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert installed.exists()


def test_a_checkpoint_does_not_choose_who_builds_it(hostile, tmp_path, installed, monkeypatch):
    spec = {"x": {"class_path": "their_nets.Net", "init_args": {}}}
    builder = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "optimizer_args": spec}
    hostile.checkpoint(tmp_path / "a.ckpt", options={"num_classes": 2, "backbone": "test_resnet", **builder})
    with contextlib.suppress(ConfigError, RuntimeError, SystemExit):  # it may load, as long as nothing is built
        FinetuneModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert not installed.exists()
    monkeypatch.setattr("finetune.module.guarded_parser", contextlib.nullcontext)
    with contextlib.suppress(BaseException):
        FinetuneModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert installed.exists(), "without the guard it would be"


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "torch.load", "timm.models.load_checkpoint", "torch.Tensor"])
def test_no_backbone_is_called_that_makes_no_network(name):
    with pytest.raises(ConfigError, match=r"is not run|is not called"):
        FinetuneModule(name, num_classes=2, weights="none")


def test_the_guard_ends_with_the_command(hostile):
    before = dict(jsonargparse._common.parsing_settings)
    hostile.outcome(["fit", "--config", "nothing.yaml"])
    hostile.outcome(["fit", "--model", "nothing.Here"])
    assert jsonargparse._common.parsing_settings == before
    typed = ["fit", "--data.root", "yaml.pictures", "--model", "my_package.Net"]
    with guarding(typed), pytest.raises(ConfigError, match="--trust yaml"):
        require_trusted("yaml.unsafe_load")
    require_trusted("yaml.unsafe_load")  # in a program of the user's


def test_trust_needs_a_name(hostile):
    assert hostile.outcome(["fit", "--trust"])[0] == 2
    code, said = hostile.outcome(["fit", "--trust", "--model.lr"])
    assert (code, said) == (2, "error: Expected --trust to be followed by the name of a package, found '--model.lr'.\n")


# -------------------------------------------------------------------------------------------------------- names in data


def tables(folder):
    for path in folder.glob("**/*.csv"):
        if path.name in ("split.csv", "per_class.csv", "confusion.csv") or path.name.startswith("pred"):
            yield path


def test_names_stay_text(hostile, tmp_path, read_page, capsys):
    hostile.named_folder(tmp_path / "data")
    options = ["--model.backbone", "test_resnet", "--model.weights", "none", "--data.image_size", "32", "--data.workers", "0"]
    (tmp_path / "run.yaml").write_text("seed_everything: 0\n")
    main(["fit", "--config", "run.yaml", *options, "--data.root", "data", "--trainer.max_epochs", "1"])
    (run,) = (tmp_path / "runs" / "run").iterdir()
    main(["predict", str(run), "data/val", "--out", "predictions.csv", "--workers", "0"])
    main(["evaluate", str(run), "--out", "evaluation", "--workers", "0", "--resamples", "10"])
    main(["check", "data", "--out", "check.csv"])
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err.replace("\x1b[A", "")
    assert not list(tmp_path.glob("**/hacked"))
    assert not list(tmp_path.glob("**/escaped.png"))

    for page in (run / "report.html", tmp_path / "evaluation" / "report.html"):
        found = read_page(page)
        found.assert_self_contained()
        assert not [tag for tag, attributes in found.elements if tag == "img" and attributes.get("src") == "x"]
        scripts = re.findall(r"<script>(.{0,20})", page.read_text(), re.DOTALL)
        assert not any(script.startswith("alert") for script in scripts)
        assert "<script>alert(1)<" in " ".join(found.text)

    paths = list(tables(tmp_path))
    assert len(paths) >= 5
    for path in paths:
        with path.open(newline="") as file:
            assert not [value for row in csv.reader(file) for value in row if value[:1] in tuple("=+-@\t\r")], path
    outcome = read_outcome(run / "predictions.val.csv")
    labels = sorted(name.replace("/", "\u2215") for name in hostile.CLASSES)
    assert list(outcome.classes) == labels
    assert {file.rpartition("/")[2] for file in outcome.files} == set(hostile.NAMES)
    assert {outcome.classes[label] for label in outcome.labels} == set(labels)


@pytest.mark.parametrize(
    "name", ["=1", "+1", "-1", "@a", "\t=1", "\ra", "\n=1", "'=1", "''=1", "'a", "a=1", "", "'", "=", "\u00e9"]
)
def test_cells_come_back(name):
    written = io.StringIO()
    csv.writer(written).writerow([cell(name)])
    (back,) = next(csv.reader(io.StringIO(written.getvalue(), newline=""))) or [""]
    assert back[:1] not in tuple("=+-@\t\r\n")
    assert from_cell(back) == name


def test_what_is_shown_can_be_printed_and_steers_nothing():
    for number in range(0x110000):
        letter = chr(number)
        text = shown(letter)
        if text != letter:
            assert text.isascii()
            assert text.isprintable()
        elif not 0xD800 <= number < 0xE000:
            letter.encode()
        else:
            raise AssertionError(hex(number))
    assert shown("a\nb\x9b", keep="\n") == "a\nb\\x9b"
    assert shown("\U0001f468\u200d\U0001f469") == "\U0001f468\u200d\U0001f469"
