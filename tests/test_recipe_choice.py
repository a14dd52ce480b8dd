"""The recipe that a folder gets when none is named, for counts made by the test."""

import pytest
from PIL import Image

from finetune.recipe_choice import choose_recipe


def folder(tmp_path, *counts):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    for label, count in enumerate(counts):
        for split, number in (("train", count), ("val", 1)):
            place = tmp_path / "pictures" / split / f"class{label}"
            place.mkdir(parents=True)
            for i in range(number):
                (place / f"{i}.png").symlink_to(picture)
    return str(tmp_path / "pictures")


@pytest.mark.parametrize(
    ("counts", "recipe"),
    [((9, 9), "few_shot"), ((9, 10, 400), "small"), ((499, 499), "small"), ((500, 501, 20), "large")],
)
def test_the_median_class_decides(tmp_path, counts, recipe):
    name, reason = choose_recipe(["--data.root", folder(tmp_path, *counts)])
    assert name == recipe
    assert f"{sorted(counts)[len(counts) // 2] if len(counts) % 2 else sum(counts) / 2:g} training pictures per class" in reason


def test_built_in_data_shots_and_random_weights():
    assert choose_recipe([])[0] == "small"
    assert choose_recipe(["--data.shots=5"])[0] == "few_shot"
    assert choose_recipe(["--model.weights", "none"]) == ("scratch", "training starts from random weights")


@pytest.mark.parametrize("words", [["--config", "large"], ["-c", "x.yaml"], ["--ckpt_path=last"], ["--model", "my.Model"]])
def test_who_says_what_to_do_is_left_alone(words):
    assert choose_recipe(words) is None


def test_a_folder_that_cannot_be_read_is_left_to_the_data_module(tmp_path):
    assert choose_recipe(["--data.root", str(tmp_path / "nothing")]) is None


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (["--data.val_fraction", "0.5", "--data.test_fraction=0.25"], 3),
        (["--data.fraction", "0.25"], 2),  # of the 10 that are left after a fifth is held out
        (["--data.fraction", "0.01"], 1),
        (["--data.folds", "3"], 8),
        (["--data.shots", "null"], 10),
        (["--data.init_args.shots", "4"], 4),
    ],
)
def test_the_pictures_that_will_train_are_counted(tmp_path, words, number):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{i}.png")
    name, reason = choose_recipe(["--data.init_args.root" if "init_args" in words[0] else "--data.root", str(tmp_path), *words])
    assert reason.startswith(f"{number} training pictures per class")
    assert name == ("small" if number >= 10 else "few_shot")
