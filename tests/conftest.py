"""Keep what the toolkit makes once (the built-in digits) out of the user's cache, for tests and doctests alike."""

import os
import shutil
import tempfile

VARIABLE = "RESNET_FINETUNE_CACHE"


def pytest_configure(config):
    config.own_cache = os.environ[VARIABLE] = tempfile.mkdtemp(prefix="resnet-finetune-tests-")


def pytest_unconfigure(config):
    shutil.rmtree(config.own_cache, ignore_errors=True)
