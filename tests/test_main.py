"""The command as a whole: help, verbs, one clear message for a mistake, and a traceback for a defect."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

import finetune
from finetune import main as command
from finetune.errors import DataError
from finetune.main import main
from finetune.verbs import Verb

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def fails(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_verb_and_its_examples_name_no_other(capsys, words):
    main(words)
    said = capsys.readouterr().out
    verbs = re.findall(r"^  ([\w-]+)  +\S", said.partition("verbs:")[2].partition("examples:")[0], re.MULTILINE)
    assert verbs == [
        *("fit", "validate", "test", "lr-find", "adapt", "distill", "check", "evaluate", "predict", "explain", "export"),
        *("report", "stages", "weights", "recipes", "reuse"),
    ]
    assert set(re.findall(r"^  resnet-finetune ([\w-]+)", said, re.MULTILINE)) <= set(verbs)
    for verb in verbs:
        try:
            main([verb, "--help"])
        except SystemExit as left:
            assert not left.code  # noqa: PT017  argparse leaves
        assert capsys.readouterr().out.startswith(f"usage: resnet-finetune {verb} ")


def test_the_script_of_a_checkout_is_the_command(tmp_path):
    words = [[sys.executable, str(ROOT / "cli.py"), "--version"], [sys.executable, str(ROOT / "cli.py"), "recipe"]]
    version, wrong = (subprocess.run(w, capture_output=True, text=True, cwd=tmp_path, check=False) for w in words)
    assert (version.returncode, version.stdout) == (0, f"resnet-finetune {finetune.__version__}\n")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == (
        "error: There is no verb 'recipe'. Did you mean 'recipes'? Expected one of: fit, validate, test, lr-find, adapt, "
        "distill, check, evaluate, predict, explain, export, report, stages, weights, recipes, reuse.\n"
    )


def test_the_words_of_the_process_are_taken_if_there_are_no_others(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["resnet-finetune", "--version"])
    main()
    assert capsys.readouterr().out == f"resnet-finetune {finetune.__version__}\n"


def test_our_errors_are_one_message_and_all_others_are_defects(monkeypatch, capsys):
    def ours(words):
        try:
            raise DataError("The folder is empty.")
        except DataError as error:
            raise RuntimeError("DataLoader worker exited") from error

    monkeypatch.setitem(command.VERBS, "recipes", Verb("", ours))
    assert fails(["recipes"], capsys) == "error: The folder is empty.\n"

    def defect(words):
        raise ZeroDivisionError

    monkeypatch.setitem(command.VERBS, "recipes", Verb("", defect))
    with pytest.raises(ZeroDivisionError):
        main(["recipes"])


def test_a_damaged_picture_in_a_worker_is_one_message_too(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            Image.effect_noise((32, 32), 99).save(tmp_path / "photos" / name / f"{number}.png")
    for file in (tmp_path / "photos" / "a").iterdir():
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF  # which the look before training does not see
        file.write_bytes(data)
    options = [
        "--model.backbone",
        "test_resnet",
        "--model.weights",
        "none",
        "--data.image_size",
        "32",
        "--data.batch_size",
        "2",
    ]
    said = fails(["fit", "--data.root", "photos", "--data.workers", "1", *options], capsys)
    assert re.fullmatch(r"error: \S*photos/a/\d\.png cannot be read as a picture: .*\n", said), said


def test_stages_of_a_network_of_the_working_folder(tmp_path, capsys):
    (tmp_path / "my_small_net.py").write_text(
        "from torch import nn\n\ndef build(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(8, num_classes))\n"
    )
    main(["stages", "my_small_net.build", "--num_classes", "5", "--input", "16"])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[3:]}
    # 3 x 8 kernels of 3 x 3 and 8 biases; 8 x 8 places with 3 * 9 * 8 products each: 13,824
    assert rows["0"][1:] == ["1", "224", "83.3%", "2", "8", "0.0", "M"]
    assert rows["head"][1:4] == ["1", "45", "16.7%"]
    assert rows["total"][1] == "269"


def test_stages_of_a_backbone(capsys):
    main(["stages", "test_resnet"])
    said = capsys.readouterr().out
    size = timm.get_pretrained_cfg("test_resnet").input_size[-1]
    assert f"multiply-adds at {size} px" in said
    assert f"{sum(p.numel() for p in timm.create_model('test_resnet').parameters()):,}" in said
    assert "at least 1, found -5" in fails(["stages", "test_resnet", "--input", "-5"], capsys)
    assert "it is not a dotted path" in fails(["stages", "./my_net.py"], capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["predict"], "the following arguments are required: model"),
        (["predict", "a", "b", "--topk", "x"], "argument --topk: invalid int value: 'x'"),
        (["predict", "a", "b", "--ovrwrite"], "There is no option '--ovrwrite'. Did you mean '--overwrite'?"),
        (
            ["predict", "a", "b", "--over"],
            "There is no option '--over'.",
        ),  # no abbreviations: they break when options are added
        (["stages"], "the following arguments are required: backbone"),
        (["weights", "--offlin"], "There is no option '--offlin'."),
        (["recipes", "--copy", "small"], "argument --copy: expected 2 arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_say_where_help_is(capsys, words, says):
    first, second = fails(words, capsys).splitlines()
    assert first.startswith(f"error: {says}")
    assert second == f"For all options: resnet-finetune {words[0]} --help"


def test_null_starts_anew_whatever_the_configuration_says(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "ckpt_path: gone.ckpt\nmodel: {init_args: {backbone: test_resnet, weights: none}}\n"
        "data: {init_args: {workers: 0}}\ntrainer: {fast_dev_run: true}\n"
    )
    main(["fit", "--config", "mine.yaml", "--ckpt_path", "null"])
    assert "weights: none" in capsys.readouterr().out
    with pytest.raises((SystemExit, OSError)):
        main(["fit", "--config", "mine.yaml"])


@pytest.mark.parametrize(
    "words",
    [
        *(["fit", "--config", "NAME"], ["fit", "--ckpt_path", "NAME"], ["fit", "NAME"], ["fit", "--data.root", "NAME"]),
        *(["predict", "NAME", "x"], ["predict", "NAME.onnx", "x"], ["report", "NAME"], ["check", "NAME"], ["export", "NAME"]),
    ],
    ids=" ".join,
)
def test_a_name_that_no_file_can_have_is_one_that_is_not_there(capsys, words):
    said = fails([word.replace("NAME", 400 * "9") for word in words], capsys)
    assert said.startswith("error: ")
    assert 400 * "9" in said
    assert "Traceback" not in said
