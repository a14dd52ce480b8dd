"""The house's shape: imports run one way, importing has no side effects, and the index of public names is complete."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import finetune

PACKAGE = Path(finetune.__file__).parent
# left never imports right; modules of one floor do not import each other unless listed in the order they stand here
ORDER = [
    "version",
    "errors",
    "escaping",
    "durations",
    "finite",
    "console",
    "own_modules",
    "schema",
    "library_errors",
    "trusted_code",
    "named_objects",
    "findings",
    "randomness",
    "files",
    "recipe_files",
    "option_names",
    "environment",
    "hardware",
    "schedules",
    "place",
    "pace",
    "adaptation_losses",
    "batch_statistics",
    "validators",
    "tiff",
    "images",
    "depth",
    "stages",
    "stage_flow",
    "flow_warnings",
    "transforms",
    "sample",
    "outcomes",
    "scores",
    "file_state",
    "allocation",
    "computation_key",
    "store",
    "spot_check",
    "decoded",
    "walk",
    "folders",
    "split_table",
    "split_changes",
    "subsets",
    "examine",
    "examined",
    "content",
    "folder_split",
    "survey",
    "left_out",
    "target",
    "freezing",
    "accepted_input",
    "backbones",
    "layouts",
    "boundaries",
    "optim",
    "timetable",
    "metrics",
    "labels",
    "losses",
    "mixing",
    "options",
    "weight_files",
    "hub",
    "card",
    "bundled_weights",
    "package_weights",
    "weight_report",
    "weight_sources",
    "weight_list",
    "weights",
    "formats",
    "checkpoint_file",
    "behind",
    "checkpoints",
    "adaptation",
    "adaptation_methods",
    "fold",
    "loading",
    "pairs",
    "reuse",
    "head_start",
    "midway",
    "positioned",
    "room",
    "runs",
    "run_split",
    "split_data",
    "data",
    "objective",
    "calibration",
    "predicting",
    "staged",
    "grad_cam",
    "strategies",
    "launchers",
    "module",
    "validation",
    "averaging",
    "soup",
    "adapt_data",
    "adapt",
    "output_places",
    "kept_states",
    "record_file",
    "interrupts",
    "saving",
    "resuming",
    "stopping",
    "slurm",
    "nonfinite",
    "record",
    "gradient_flow",
    "recipe_choice",
    "apart",
    "repeats",
    "arguments",
    "callbacks",
    "keep_outcomes",
    "progress",
    "parser",
    "defaults",
    "trained",
    "predictor",
    "rows",
    "predict",
    "run_files",
    "domains",
    "domain_table",
    "figure_style",
    "lr_find",
    "curve_figures",
    "outcome_figures",
    "domain_figures",
    "thumbnails",
    "check",
    "figures",
    "augmented",
    "page",
    "report",
    "comparison",
    "labelled",
    "evaluate",
    "model_card",
    "export",
    "explain",
    "distill_data",
    "distill",
    "mistakes",
    "wandb_tracking",
    "tracking",
    "run_callbacks",
    "closing",
    "usage",
    "training_cli",
    "training",
    "compare",
    "lr_verb",
    "verbs",
    "main",
    "__main__",
]


def imported(path):
    tree = ast.parse(path.read_text())
    skip = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finetune"):
            if node.module == "finetune":
                yield from (alias.name for alias in node.names)
            else:
                yield node.module.split(".")[1]
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("finetune."))


def test_every_module_has_a_place():
    assert sorted(ORDER) == sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    right = set(ORDER[ORDER.index(name) :])
    assert not set(imported(PACKAGE / f"{name}.py")) & right


def test_public_names_exist_and_are_sorted():
    names = finetune.__all__[1:]
    assert names == sorted(names)
    assert all(getattr(finetune, name) is not None for name in names)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        finetune.nope  # noqa: B018


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["recipes"]])
def test_quick_answers_need_no_torch(words):
    code = (
        "import sys; from finetune.main import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'timm', 'numpy', 'jsonargparse', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_importing_the_package_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import finetune; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout
