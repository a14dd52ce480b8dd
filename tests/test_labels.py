"""The same labels in every form give the same training; what is no label of these classes is refused in a sentence."""

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.data import DataLoader

from finetune import DataError, FinetuneModule
from finetune.labels import classes_of, joined, labels_of
from finetune.losses import training_counts

INDICES = [2, 0, 1, 1, 0]
ONE_HOT = [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float64]
)
@pytest.mark.parametrize("form", ["(N,)", "(N, 1)", "(N, C)"])
def test_kinds_that_are_taken(form, dtype):
    given = torch.tensor(ONE_HOT if form == "(N, C)" else INDICES, dtype=dtype)
    found = labels_of(given[:, None] if form == "(N, 1)" else given, 5, 3)
    assert found.dtype == (torch.float32 if form == "(N, C)" else torch.int64)
    assert found.tolist() == given.tolist()
    assert classes_of(found).tolist() == INDICES


@pytest.mark.parametrize(
    "given", [INDICES, np.array(INDICES, np.uint16), np.array(ONE_HOT, bool), torch.tensor(ONE_HOT).bool()]
)
def test_lists_arrays_and_truth_values(given):
    assert classes_of(labels_of(given, 5, 3)).tolist() == INDICES
    assert labels_of(torch.tensor([True, False]), 2, 2).tolist() == [1, 0]


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
def test_shares_in_any_precision_are_a_distribution(classes, dtype):
    generator = torch.Generator().manual_seed(len(classes))
    soft = (F.one_hot(torch.tensor(classes), 5) * 9 + torch.rand(len(classes), 5, generator=generator)).softmax(1)
    found = labels_of(soft.to(dtype), len(classes), 5)
    assert classes_of(found).tolist() == classes
    torch.testing.assert_close(found.double(), soft.double(), atol=4e-3, rtol=0)


REFUSED = [
    ([0, 3, 1], "lie between 0 and 3: expected class indices from 0 to 2. Check the labels"),
    ([1, 3, 2], "lie between 1 and 3: expected class indices from 0 to 2. They seem to count from 1: subtract 1."),
    ([0, -1, 2], "lie between -1 and 2: expected class indices from 0 to 2. An image without a class cannot be left out by"),
    ([0.0, 1.5, 2.0], "not whole numbers, such as 1.5: expected class indices from 0 to 2, or a distribution"),
    ([0.0, float("nan"), 2.0], "not whole numbers, such as nan"),
    (["cat", "dog", "cat"], "are strings, such as 'cat': expected class indices. Let the dataset return their positions"),
    (("cat", "dog", "cat"), "are strings, such as 'cat'"),
    (np.array(["cat", "dog", "cat"]), "are strings, such as 'cat'"),
    (None, "are NoneType: expected a tensor of class indices"),
    ({"a": 1}, "are dict: expected a tensor of class indices"),
    ([0, 1], "have the shape (2,): expected (3,), a class index for each of its 3 images, or (3, 3), a distribution over"),
    (torch.zeros(3, 2), "have the shape (3, 2): expected (3,)"),
    (torch.zeros(3, 1, 1), "have the shape (3, 1, 1): expected (3,)"),
    (torch.tensor(2), "have the shape (): expected (3,)"),
    ([[1, 0, 1], [1, 0, 0], [0, 1, 0]], "give an image 2 classes at once: expected rows that add up to 1. Several labels per"),
    ([[0, 0, 1], [0, 0, 0], [0, 1, 0]], "a row adds up to 0 and holds values from 0 to 0"),
    ([[0.5, 0.2, 0.3], [0.5, 0.8, 0.3], [0, 1, 0]], "a row adds up to 1.6 and holds values from 0.3 to 0.8"),
    ([[0.5, 0.2, 0.3], [1.5, -0.8, 0.3], [0, 1, 0]], "a row adds up to 1 and holds values from -0.8 to 1.5"),
    ([[0.5, 0.2, 0.3], [float("nan")] * 3, [0, 1, 0]], "a row adds up to nan"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_kinds_that_are_refused(given, says):
    with pytest.raises(DataError) as caught:
        labels_of(torch.tensor(given) if isinstance(given, list) and not isinstance(given[0], str) else given, 3, 3)
    assert str(caught.value).startswith("The labels of a batch ")
    assert says in str(caught.value)


def test_labels_of_two_domains_become_one():
    soft, hard = torch.tensor([[0.25, 0.75], [1.0, 0.0]]), torch.tensor([1, 0])
    assert joined(hard, hard).tolist() == [1, 0, 1, 0]
    assert joined(soft, hard).tolist() == [[0.25, 0.75], [1, 0], [0, 1], [1, 0]]
    assert joined(hard, soft).tolist() == [[0, 1], [1, 0], [0.25, 0.75], [1, 0]]


# -------------------------------------------------------------------------------------------------------- in a training


def in_form(labels, form):
    if form == "one-hot":
        return F.one_hot(labels, 3).float()
    return labels.float() if form == "float" else labels.int()[:, None] if form == "column" else labels


def trained(tmp_path, form, **options):
    """Train and validate on labels in some form; return the metrics."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor(INDICES * 6)
    images = (torch.rand(30, 3, 32, 32, generator=generator) * 100 + labels[:, None, None, None] * 70).to(torch.uint8)

    def collate(items):
        chosen, classes = zip(*items, strict=True)
        return torch.stack(chosen), in_form(torch.stack(classes), form)

    loader = DataLoader(list(zip(images, labels, strict=True)), 10, collate_fn=collate)
    torch.manual_seed(0)
    L.seed_everything(0, verbose=False)
    module = FinetuneModule("test_resnet", num_classes=3, weights="none", lr=0.05, **options)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader, loader)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("options", [{}, {"mixup": 0.4, "label_smoothing": 0.1}, {"focal_gamma": 2.0}], ids=str)
def test_one_training_whatever_the_form_of_its_labels(tmp_path, options):
    plain = trained(tmp_path, "plain", **options)
    assert 0 < plain["train/acc"] <= 1
    for form in ("one-hot", "float", "column"):
        assert trained(tmp_path, form, **options) == pytest.approx(plain, abs=1e-4)


def test_class_counts_of_a_data_module():
    class Data:
        def __init__(self, labels):
            self.labels = lambda split: labels

    assert training_counts(Data(INDICES), 3) == [2, 2, 1]
    assert training_counts(Data(np.array(ONE_HOT)), 3) == [2, 2, 1]
    with pytest.raises(DataError, match=r"The labels that Data.labels\('train'\) returns are strings, such as 'cat'"):
        training_counts(Data(["cat", "dog"]), 3)
    with pytest.raises(DataError, match="lie between -1 and 1: expected class indices from 0 to 2"):
        training_counts(Data([0, -1, 1]), 3)
