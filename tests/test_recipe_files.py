"""Finding, listing and copying recipes, against the files as they lie in the folder."""

from pathlib import Path

import pytest

from finetune.errors import ConfigError
from finetune.main import main
from finetune.recipe_files import SWEEP, copy_recipe, find_recipe, header, recipe_names, recipes_folder


def test_list_and_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["recipes"])
    said = capsys.readouterr().out
    assert all(name in said and header(recipes_folder() / f"{name}.yaml")[0] in said for name in recipe_names())
    main(["recipes", "--copy", "small", "mine.yaml"])
    assert (tmp_path / "mine.yaml").read_text() == (recipes_folder() / "small.yaml").read_text()
    with pytest.raises(SystemExit):
        main(["recipes", "--copy", "small", "mine.yaml"])
    assert "not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["small", "small.yaml", "small.yml", "recipes/small", "recipes/small.yaml"])
def test_a_recipe_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(word).read_bytes() == (Path(__file__).parents[1] / "recipes" / "small.yaml").read_bytes()


def test_a_file_of_the_user_goes_before_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text("model: {}\n")
    assert find_recipe("small.yaml") == Path("small.yaml")
    assert find_recipe("small") == recipes_folder() / "small.yaml"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("smal", "Did you mean 'small'"),
        ("recipes/smal.yaml", "Did you mean 'small'"),
        ("elsewhere/small.yaml", "Did you mean 'small'"),
        ("mine.yml", "Did you mean 'mine.yaml'"),
        ("below/mine.yml", "Did you mean 'below/mine.yaml'"),
    ],
)
def test_what_is_not_there_is_answered_with_the_nearest(tmp_path, monkeypatch, word, says):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "below/mine.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    with pytest.raises(ConfigError, match=says):
        find_recipe(word)


def test_the_header_ends_with_the_comment(tmp_path):
    (tmp_path / "a.yaml").write_text("# One\n#two\n\n# not part of it\nmodel: 1\n")
    assert header(tmp_path / "a.yaml") == ["One", "two"]


def test_copy_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'large'"):
        copy_recipe("larg", tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"folder .*nowhere does not exist"):
        copy_recipe("large", tmp_path / "nowhere" / "a.yaml")
    (tmp_path / "a.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="not overwritten"):
        copy_recipe("large", tmp_path / "a.yaml")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.yaml", "mine")]


def test_the_sweep_is_listed_and_copied_but_is_no_recipe_of_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert SWEEP not in recipe_names()
    main(["recipes"])
    assert header(recipes_folder() / "sweep.yaml")[0] in capsys.readouterr().out
    main(["recipes", "--copy", "sweep", "mine.yaml"])
    assert "wandb sweep mine.yaml" in capsys.readouterr().out
    assert (tmp_path / "mine.yaml").read_text() == (recipes_folder() / "sweep.yaml").read_text()
    with pytest.raises(ConfigError, match="wandb sweep"):
        find_recipe("sweep")


@pytest.mark.parametrize("kind", ["link", "broken link", "folder"])
def test_a_copy_never_writes_through_a_link(tmp_path, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("mine")
    if kind == "folder":
        (tmp_path / "x.yaml").mkdir()
    else:
        (tmp_path / "x.yaml").symlink_to(tmp_path / "mine" / ("a" if kind == "link" else "new"))
    with pytest.raises(ConfigError, match="exists already"):
        copy_recipe("small", tmp_path / "x.yaml")
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["mine"]
