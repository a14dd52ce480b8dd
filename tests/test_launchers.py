"""What launchers put into the environment -> devices and nodes of the trainer, or a sentence."""

import os

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from finetune import ConfigError
from finetune.launchers import Launch, find_launch, settle_processes

PREFIXES = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_", "MPI_", "MV2_", "JSM_", "LSB_")
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
NODES = TORCHRUN | {"WORLD_SIZE": "4"}
SRUN = {
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NNODES": "3",
    "SLURM_STEP_ID": "0",
}
JSRUN = {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "x", "JSM_NAMESPACE_LOCAL_RANK": "0", "JSM_NAMESPACE_SIZE": "6"}


@pytest.fixture
def launched(monkeypatch):
    """Return a function that makes the environment of a launched process."""
    for name in [name for name in os.environ if name.startswith(PREFIXES) or name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")  # so that what is set by default is forgotten again
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    monkeypatch.setattr("finetune.launchers.MPIEnvironment.detect", lambda: False)  # whether mpi4py is installed or not

    def launch(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return launch


def options(devices="auto", num_nodes=1, plugins=None):
    return {"devices": devices, "num_nodes": num_nodes, "accelerator": "cpu", "plugins": plugins}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, Launch("torchrun", 2, 1)),
        (NODES, Launch("torchrun", 4, 2)),
        (TORCHRUN | SRUN, Launch("torchrun", 2, 1)),  # torchrun within a task of SLURM
        (SRUN, Launch("srun", 4, 2)),
        ({"SLURM_NTASKS": "1"}, Launch("srun", 1, 1)),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"}, None),
        (JSRUN | {"JSM_NAMESPACE_LOCAL_SIZE": "3"}, Launch("jsrun", 6, 2)),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_what_was_started(launched, environment, expected):
    launched(environment)
    assert find_launch() == expected


@pytest.mark.parametrize(
    ("environment", "given", "devices", "nodes", "says"),
    [
        ({}, {}, "auto", 1, False),
        ({}, {"devices": 3, "num_nodes": 2}, 3, 2, False),
        (TORCHRUN, {}, 2, 1, True),
        (TORCHRUN, {"devices": 2}, 2, 1, False),
        (TORCHRUN, {"devices": "2"}, "2", 1, False),
        (NODES, {}, 2, 2, True),
        (NODES, {"devices": 2}, 2, 2, True),
        (NODES, {"num_nodes": 2}, 2, 2, True),
        (SRUN, {}, 2, 2, True),
        ({"SLURM_NTASKS": "1"}, {}, 1, 1, False),
    ],
)
def test_what_the_trainer_is_told(launched, environment, given, devices, nodes, says):
    launched(environment)
    config = options(**given)
    assert bool(settle_processes(config)) == says
    assert (config["devices"], config["num_nodes"]) == (devices, nodes)
    if environment == SRUN:
        assert os.environ["SLURM_NTASKS_PER_NODE"] == "2"


@pytest.mark.parametrize(
    ("environment", "given", "says"),
    [
        (
            TORCHRUN,
            {"devices": 4},
            "torchrun has started 2 processes on 1 node, but trainer.devices is 4 and trainer.num_nodes is 1:",
        ),
        (TORCHRUN, {"devices": 2, "num_nodes": 2}, "expected trainer.devices 2 and trainer.num_nodes 1"),
        (TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, {"devices": 2}, "has started 1 process on 1 node, but"),
        (NODES, {"devices": 1}, "torchrun has started 4 processes on 2 nodes, but trainer.devices is 1"),
        (NODES, {"num_nodes": 3}, "trainer.num_nodes is 3: expected trainer.devices 2 and trainer.num_nodes 2"),
        (
            TORCHRUN | {"WORLD_SIZE": "3"},
            {},
            "has started 3 processes on 1 node: expected equally many on each (WORLD_SIZE is 3)",
        ),
        (TORCHRUN | {"WORLD_SIZE": "x"}, {}, "The environment variable WORLD_SIZE is 'x': expected a number of 1 or more."),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "3"}, {}, "srun has started 3 processes on 2 nodes: expected equally many"),
        ({"SLURM_NTASKS": "8"}, {}, "SLURM gave this job 8 tasks, but this process was not started by srun"),
        (SRUN | {"SLURM_JOB_NAME": "interactive"}, {}, "srun has started 4 tasks in an interactive job"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, "mpirun has started 2 processes, which find each other through mpi4py only"),
    ],
)
def test_what_contradicts_itself(launched, environment, given, says):
    launched(environment)
    with pytest.raises(ConfigError) as caught:
        settle_processes(options(**given))
    assert says in str(caught.value)


def test_an_environment_of_the_users_own_is_left_alone(launched):
    launched(TORCHRUN)
    config = options(plugins=[LightningEnvironment()])
    assert settle_processes(config) is None
    assert config["devices"] == "auto"
